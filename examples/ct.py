"""Ask about a CT series, a NIfTI file or an array: python examples/ct.py MODEL VOLUME QUESTION"""

import sys

import llavakit
from llavakit.media import load_volume

model_path, path, question = sys.argv[1:]
volume = load_volume(path)  # a folder of DICOM files, .nii.gz or .npy; Hounsfield units
print(f"{' x '.join(map(str, volume.values.shape))} voxels from {volume.values.min():g} to {volume.values.max():g}")
model = llavakit.load(model_path)  # MedM-VL's, for instance; the window is in its configuration
content = [{"type": "volume", "volume": path}, {"type": "text", "text": question}]
print(model.chat([{"role": "user", "content": content}], max_new_tokens=256))
