"""Imports the extension module of a CMake build folder and runs one op: import_build.py FOLDER."""

import importlib.util
import sys
from pathlib import Path

import torch

(path,) = Path(sys.argv[1]).glob("_C.*.so")
spec = importlib.util.spec_from_file_location("_C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
mask = torch.arange(70) % 3 == 0
if not torch.equal(module.unpack_mask(module.pack_mask(mask), [70]), mask):
    sys.exit("the imported build packs masks wrongly")
info = module.build_info()
print(f"imported a build for torch {info['torch']}, CUDA {info['cuda']}: {info['cuda_architectures']}")
