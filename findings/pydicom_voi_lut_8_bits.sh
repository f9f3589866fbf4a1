#!/usr/bin/env bash
# pydicom's apply_voi_lut applies a VOI LUT with more than 256 entries of 8 bits wrongly, without a warning: positions in
# the table are held in the type of its entries (uint8), so stored value 256 takes entry 0, and 4095 entry 255.
# PS3.3 C.11.2.1.1 allows 8 bits per entry whatever the number of entries. Expected: 0 15 16 255.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

print("pydicom", pydicom.__version__, "numpy", np.__version__)
item = Dataset()
item.add_new("LUTDescriptor", "US", [4096, 0, 8])
item.add_new("LUTData", "US", [value // 16 for value in range(4096)])
stored = np.array([0, 255, 256, 4095], np.uint16)

data = Dataset()
data.PhotometricInterpretation = "MONOCHROME2"
data.VOILUTSequence = Sequence([item])
voi = apply_voi_lut(stored, data).tolist()
data = Dataset()
data.ModalityLUTSequence = Sequence([item])
modality = apply_modality_lut(stored, data).tolist()
print("stored values      ", stored.tolist())
print("as VOI LUT         ", voi)
print("as modality LUT    ", modality, "(the same table, right)")
if voi != [0, 15, 0, 15] or modality != [0, 15, 16, 255]:
    raise SystemExit("the behaviour has changed")
print("confirmed: values above 255 take the wrong entry of the VOI LUT")
PYTHON
