"""What the processes of `forked.py` have imported before they are forked."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # as `one_thread` of tests/conftest.py, and read when torch is imported
os.environ["DS_ACCELERATOR"] = "cpu"  # as rwkv_miss/training/zero.py does on a machine without a GPU

import bitsandbytes  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (what DeepSpeed imports last, with torch's compiler)
import torch.utils.tensorboard  # noqa: F401

import rwkv_miss.training.run  # noqa: F401

gc.freeze()  # a collection, which DeepSpeed asks for now and then, need not look at what was imported
