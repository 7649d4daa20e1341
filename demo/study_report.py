"""Tables and pictures of study.py, from its records."""
import torch

MONITORS = ('next_cosine', 'copy_cosine', 'lift', 'embedding_std', 'embedding_rank',
            'output_rank')


def device():
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'


def write(work_dir):
    pass
