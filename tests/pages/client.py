"""What a page's shell finds as `llavakit` and `python`: hands the command to the warm process and waits for it.

A server (`llavakit serve`) goes on in the background until the page starts another or ends, and counts as started when
it answers; its port is the page's.
"""

import os
import sys
import time
import urllib.error
import urllib.request

sys.path.insert(0, os.path.dirname(__file__))
from warm import ask

SERVERS = ("serve", "studio")


def healthy(port: str, pid: int) -> bool:
    """Wait for a server; False if it ended instead."""
    while True:
        try:
            os.kill(pid, 0)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except ProcessLookupError:
            return False
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.05)


def main() -> int:
    path, page, port = (os.environ[f"PAGES_{name}"] for name in ("SOCKET", "NAME", "PORT"))
    argv = sys.argv[1:]
    request = {"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ), "page": page}
    if argv[0] == "llavakit" and argv[1] in SERVERS and "--help" not in argv:
        if any(ask(path, {"stop": page})):
            print("the server that ran before did not end with status 0", file=sys.stderr)
            return 1
        argv += [] if "--port" in argv else ["--port", port]
        pid = ask(path, request | {"background": True})["pid"]
        return 0 if healthy(argv[argv.index("--port") + 1], pid) else 1
    return ask(path, request).get("status", 1)


if __name__ == "__main__":
    sys.exit(main())
