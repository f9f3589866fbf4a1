"""Find passages for a text or a picture: python examples/retrieval.py ENCODER PAGES STORE QUERY

ENCODER is a CLIP, SigLIP or text encoder; PAGES a JSONL file, or a folder of Markdown and HTML. STORE is built once.
"""

import sys
from pathlib import Path

from llavakit.media import load_image
from llavakit.retrieval.encoder import load_encoder
from llavakit.retrieval.index import build_store
from llavakit.retrieval.pages import open_pages
from llavakit.retrieval.retriever import open_retriever

encoder_path, pages, store, query = sys.argv[1:]
if not Path(store).exists():
    built = build_store(open_pages(pages), Path(store), load_encoder(encoder_path))
    print(f"{built.entries} passages of {built.pages} pages")
retriever = open_retriever(store, encoder=encoder_path)
wanted = load_image(query) if Path(query).is_file() else query
for hit in retriever.retrieve([wanted], k=3)[0]:
    print(f"{hit.score:.3f}  {hit.entry.title}: {' '.join(hit.entry.text.split())[:100]}")
