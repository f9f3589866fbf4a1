#!/usr/bin/env bash
# transformers' own model and processor tests, run on llavakit's classes.
# The test files come from the source distribution of the installed transformers and are unpacked outside the
# repository; what they import and the distribution lacks is stubbed there. Extra arguments go to pytest.
set -euo pipefail
PYTHON=${PYTHON:-python}
version=$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("transformers"))')
home="${XDG_CACHE_HOME:-$HOME/.cache}/llavakit/transformers-tests-$version"
if [ ! -f "$home/.complete" ]; then
  rm -rf "$home" && mkdir -p "$home"
  "$PYTHON" -m pip install --quiet ${PIP_ARGS:-} parameterized setuptools wheel
  # shellcheck disable=SC2086
  "$PYTHON" -m pip download --quiet ${PIP_ARGS:-} --no-deps --no-binary :all: --no-build-isolation \
    --dest "$home/sdist" "transformers==$version"
  tar xzf "$home"/sdist/*.tar.gz -C "$home/sdist"
  package="$home/transformers_tests"
  mkdir -p "$package"/{exporters,generation,utils}
  cp "$home"/sdist/transformers-*/tests/*.py "$package"/
  touch "$package"/__init__.py "$package"/{exporters,generation,utils}/__init__.py
  echo "class ExportTesterMixin: pass" > "$package/exporters/test_export.py"
  echo "class GenerationTesterMixin: pass" > "$package/generation/test_utils.py"
  echo "config_common_kwargs = {}" > "$package/utils/test_configuration_utils.py"
  # pictures that the tests would fetch are one that is made here
  "$PYTHON" -c "from PIL import Image; Image.radial_gradient('L').convert('RGB').save('$home/picture.png')"
  echo "def url_to_local_path(url, *args, **kwargs): return '$home/picture.png'" > "$home/fetch_hub_objects_for_ci.py"
  rm -rf "$home/sdist"
  touch "$home/.complete"
fi
PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 "$PYTHON" -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q tests/mixins "$@"
