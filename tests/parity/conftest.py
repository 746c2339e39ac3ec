"""Quiet transformers: its load reports are not what these tests are about."""

from __future__ import annotations

import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
