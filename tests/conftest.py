"""For all tests: one thread, since tensors are tiny and the cores are shared with the processes that tests start."""
import torch

torch.set_num_threads(1)
