"""Trains a small model on photographs with the fused embedding, from image files to the loss.

    JPEGs + captions → tokenizer → packed batches → decode, resize, CLIP normalise → a small vision
    tower → fused embedding on megatron-core's LanguageModelEmbedding → a small causal head → loss

``make demo`` runs it; it prints at most 40 lines and ends with the next command to try. With a CUDA
device everything runs there in bf16, with compiled kernels. Without one the same kernels run in
Triton's interpreter, in fp32, at small sizes. Afterwards the fused embedding is compared with the
reference (forward and every gradient), and a picture of a pack is written.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Set before any kernel is imported, when Triton reads it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# megatron-core warns about every optional package that it finds missing.
warnings.filterwarnings("ignore", module=r"megatron\.core\..*")

import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from examples.row_map import draw_row_map
from step37_data.common.extras import how_to_get
from step37_data.preprocess import preprocess_packed_batch
from step37_data.provider import Step37Flickr8kSFTDataProvider
from step37_inspect import style
from step37_kernels import ImageForInsert, ImageInsertEmbedding, clip_normalize, plan_insert
from step37_kernels import reference as ref
from step37_kernels.testing import InsertCase, deviation, expected

HERE = Path(__file__).resolve().parent
IMAGE_SIZE, PATCH_SIZE = 112, 14
IMAGE_ROWS = (IMAGE_SIZE // PATCH_SIZE // 2) ** 2
HIDDEN, TOWER_WIDTH = 64, 96
PACK_LENGTH = 192


class VisionTower(nn.Module):
    """A small vision tower: patches of 14 pixels, joined 2×2: 112 px → 8×8 → 4×4 rows of width C.

    It returns a channels-first view ``[N, L, C]``, as the vision tower of Step-3.7 does.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width // 2, PATCH_SIZE, PATCH_SIZE)
        self.merge = nn.Conv2d(width // 2, width, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.merge(F.gelu(self.patches(images)))
        return features.flatten(2).transpose(1, 2)


class CausalHead(nn.Module):
    """Replaces the language model: one attention layer and an output layer.

    Attention is causal, within each sub-sequence of the pack.
    """

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU())
        self.output = nn.Linear(2 * hidden, vocabulary)

    def forward(self, embeddings: Tensor, cu_seqlens: Tensor) -> Tensor:
        """``[S, 1, H]`` → logits ``[S, vocabulary]``."""
        x = embeddings[:, 0]
        position = torch.arange(x.shape[0], device=x.device)
        segment = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
        visible = (segment[:, None] == segment[None]) & (position[:, None] >= position[None])
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(
            q[None, None], k[None, None], v[None, None], attn_mask=visible
        )
        logits: Tensor = self.output(self.mlp(x + attended[0, 0]))
        return logits


class Model(nn.Module):
    """Tower, fused embedding and head, connected as in ``Step37Model``."""

    def __init__(self, vocabulary: int, impl: Any) -> None:
        super().__init__()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            hidden_dropout=0.0,
            use_cpu_initialization=True,
        )
        self.words = LanguageModelEmbedding(
            config,
            vocab_size=vocabulary,
            max_sequence_length=PACK_LENGTH,
            position_embedding_type="rope",
        )
        self.tower = VisionTower(TOWER_WIDTH)
        self.fuse = ImageInsertEmbedding(
            self.words, TOWER_WIDTH, HIDDEN, projector_bias=True, impl=impl, strict=True
        )
        self.head = CausalHead(HIDDEN, vocabulary)

    def encode(self, images: list[ImageForInsert]) -> list[ImageForInsert]:
        """Run the tower; returns the groups with ``image_features`` set."""
        return [
            ImageForInsert(
                insert_start_token=group.insert_start_token,
                image_features=self.tower(group.images),
            )
            for group in images
        ]

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Compute the mean loss over the tokens that count in it."""
        fused = self.fuse(batch["input_ids"], self.encode(batch["images"]))
        logits = self.head(fused, batch["cu_seqlens"]).float()
        losses = F.cross_entropy(logits, batch["labels"][0], reduction="none")
        mask = batch["loss_masks"][0]
        return (losses * mask).sum() / mask.sum()


def start_megatron() -> None:
    """Initialise Megatron with one process, on gloo, because its embedding needs its groups."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def load_packs(device: torch.device, dtype: torch.dtype) -> tuple[list[dict[str, Any]], Any, int]:
    """Load all packs of the example photographs; also returns the data set and its vocabulary."""
    provider = Step37Flickr8kSFTDataProvider(
        tokenizer_path=str(HERE / "tokenizer"),
        cache_dir=str(HERE / "flickr8k_mini"),
        sample_count=None,
        image_token_count=IMAGE_ROWS,
        image_size=IMAGE_SIZE,
        max_packing_seqlen=PACK_LENGTH,
        cache_lengths=False,
        dataset_sampling="sequential",
    )
    packs, _, _ = provider.build_datasets(None)
    batches = [
        preprocess_packed_batch(
            packs[i],
            img_start_token_id=provider.img_start_token_id,
            patch_start_token_id=provider.patch_start_token_id,
            image_size=provider.image_size,
            patch_image_size=provider.patch_image_size,
            encoder_patch_size=provider.encoder_patch_size,
            device=device,
            dtype=dtype,
        )
        for i in range(len(packs))
    ]
    return batches, packs, len(packs.datasets[0].template.tokenizer)


def train(model: Model, batches: list[dict[str, Any]], steps: int) -> list[float]:
    """Train by AdamW over the packs in turn; losses are read only at the end of an epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[Tensor] = []
    start = time.perf_counter()
    for step in range(steps):
        loss = model(batches[step % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % (2 * len(batches)) == 0 or step + 1 == steps:
            mean = torch.stack(losses[-len(batches) :]).mean().item()
            bar = "█" * round(24 * (step + 1) / steps)
            seconds = time.perf_counter() - start
            print(f"  step {step + 1:3d}/{steps} [{bar:<24}] loss {mean:6.3f}  {seconds:5.1f} s")
    return torch.stack(losses).tolist()


def check_against_reference(model: Model, batch: dict[str, Any]) -> bool:
    """Compare output and every gradient of the fused embedding with the reference in float64."""
    with torch.no_grad():
        features = [
            (group.insert_start_token, [group.image_features.detach().requires_grad_()])
            for group in model.encode(batch["images"])
            if isinstance(group.image_features, Tensor)
        ]
        embeddings = model.words(input_ids=batch["input_ids"], position_ids=None).requires_grad_()
    projector = model.fuse.align_projector
    case = InsertCase(
        input_ids=batch["input_ids"],
        embeddings=embeddings,
        groups=features,
        weight=projector.weight,
        bias=projector.bias,
        grad_output=torch.randn_like(embeddings),
    )
    fuse = ImageInsertEmbedding(
        lambda **_: embeddings, TOWER_WIDTH, HIDDEN, projector_bias=True, impl=model.fuse.impl
    )
    fuse.align_projector = projector
    output = fuse(
        batch["input_ids"],
        [ImageForInsert(insert_start_token=t, image_features=f) for t, f in features],
    )
    leaves = [embeddings, projector.weight, projector.bias, *case.features]
    grads = torch.autograd.grad(output, leaves, case.grad_output)
    wanted = expected(case)
    assert wanted.grad_bias is not None
    assert wanted.grad_bias_bound is not None
    exact = torch.zeros_like(wanted.grad_embeddings)
    rows = {
        "output": (output, wanted.output, wanted.output_bound),
        "gradient of the word embeddings": (grads[0], wanted.grad_embeddings, exact),
        "gradient of the projector weight": (
            grads[1],
            wanted.grad_weight,
            wanted.grad_weight_bound,
        ),
        "gradient of the projector bias": (grads[2], wanted.grad_bias, wanted.grad_bias_bound),
        "gradient of the image features": (
            grads[3],
            wanted.grad_features[0],
            wanted.grad_features_bound[0],
        ),
    }
    right = True
    for name, (actual, value, bound) in rows.items():
        worst, share = deviation(actual, value, bound)
        right &= share <= 1
        allowed = "exact" if worst == 0 else f"{share:.1%} of what rounding allows"
        print(f"  {name:33s} largest deviation {worst:.1e}  ({allowed})")
    return right


def check_normalize(device: torch.device, impl: Any) -> bool:
    """Compare ``clip_normalize`` with the reference, bit for bit, in every dtype."""
    pixels = torch.randint(0, 256, (2, 37, 53, 3), dtype=torch.uint8)
    right = True
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        fused = clip_normalize(pixels.to(device), dtype=dtype, impl=impl).cpu()
        different = (fused != ref.clip_normalize(pixels, dtype=dtype)).sum().item()
        right &= different == 0
        print(f"  normalise to {dtype!s:15s} values that differ: {different} of {fused.numel()}")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small model with the fused embedding.")
    # The interpreter is slow; on a GPU more steps cost nothing.
    parser.add_argument("--steps", type=int, default=96 if torch.cuda.is_available() else 48)
    parser.add_argument("--impl", choices=("auto", "triton", "torch"), default="triton")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    arguments = parser.parse_args()
    torch.manual_seed(37)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    if not cuda:
        torch.set_num_threads(1)  # the tensors are small: more threads only wait for one another
    where = torch.cuda.get_device_name() if cuda else "the CPU, in Triton's interpreter"
    print(f"torch {torch.__version__}, kernels on {where}, {dtype}")

    start_megatron()
    batches, packs, vocabulary = load_packs(device, dtype)
    photographs = sum(len(group.images) for batch in batches for group in batch["images"])
    print(
        f"{len(packs.datasets[0])} captions and {photographs} photographs in {len(batches)} packs "
        f"of up to {PACK_LENGTH} tokens"
    )

    print("training a small vision tower, the fused embedding and a head")
    model = Model(vocabulary, arguments.impl).to(device=device, dtype=dtype)
    losses = train(model, batches, arguments.steps)
    first = sum(losses[: len(batches)]) / len(batches)
    last = sum(losses[-len(batches) :]) / len(batches)

    print("the fused path against the reference in float64")
    right = check_against_reference(model, batches[0])
    right &= check_normalize(device, arguments.impl)
    dist.destroy_process_group()

    print("\nShown:")
    print(f"  the loss fell from {first:.3f} to {last:.3f}, through kernels on {where}")
    agree = "agree with" if right else "DEVIATE from"
    print(f"  output, gradients and pixels {agree} the reference")
    picture = draw(batches[0], packs, arguments.out / "pack.png")
    print(f"  which feature row went where: {picture}")
    print("Next: step37-data inspect examples/flickr8k_mini --tokenizer examples/tokenizer \\")
    print("          --html out/data.html   (in .venv/bin)")
    if not right:
        print("FAILED: the fused path deviates from the reference", file=sys.stderr)
    if last >= first / 2:
        print(f"FAILED: the loss fell only from {first:.3f} to {last:.3f}", file=sys.stderr)
    return 0 if right and last < first / 2 else 1


def draw(batch: dict[str, Any], packs: Any, path: Path) -> str:
    """Draw the first pack's row map; returns where it is, or what is missing to draw it."""
    plan = plan_insert(
        batch["input_ids"],
        [(g.insert_start_token, [IMAGE_ROWS] * len(g.images)) for g in batch["images"]],
    )
    try:
        style.save(draw_row_map(packs[0], plan, packs.datasets[0].template.tokenizer), path)
    except ModuleNotFoundError as error:
        return f"not drawn, {how_to_get(error)}"
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
