#!/usr/bin/env bash
# Pillow 13 gives other pixels than Pillow 12 when it resizes a picture much taller than wide: it resizes columns before
# rows where that is cheaper, and rounds to 8 bits in between. Up to 11 grey levels on noise. Up to version 12 rows always
# came first. Preprocessing of a model that was trained before then differs on such pictures, and code that crops early,
# relying on the order of the passes, is no longer equal to resizing the whole.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/resize.py" <<'PYTHON'
import sys
import numpy as np
import PIL
from PIL import Image

picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (83, 41, 3), np.uint8))
whole = np.asarray(picture.resize((32, 64), Image.Resampling.BICUBIC)).astype(int)
rows_first = picture.resize((32, 83), Image.Resampling.BICUBIC).resize((32, 64), Image.Resampling.BICUBIC)
columns_first = picture.resize((41, 64), Image.Resampling.BICUBIC).resize((32, 64), Image.Resampling.BICUBIC)
gaps = [int(np.abs(whole - np.asarray(other)).max()) for other in (rows_first, columns_first)]
print(f"Pillow {PIL.__version__}: 41x83 to 32x64, largest difference to rows first {gaps[0]}, to columns first {gaps[1]}")
np.save(sys.argv[1], whole)
PYTHON
for version in 12.0.0 13.0.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "pillow==$version" numpy==2.4.6
  "$folder/$version/bin/python" "$folder/resize.py" "$folder/$version.npy"
done
"$folder/13.0.0/bin/python" - "$folder" <<'PYTHON'
import sys
import numpy as np

old, new = (np.load(f"{sys.argv[1]}/{version}.npy") for version in ("12.0.0", "13.0.0"))
gap = int(np.abs(old - new).max())
print("largest difference between the two versions:", gap)
if not gap:
    raise SystemExit("the behaviour has changed")
print("confirmed: the same call gives other pixels")
PYTHON
