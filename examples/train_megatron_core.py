"""Trains with megatron-core alone, without Megatron-Bridge, in two processes on the CPU.

The model is a vision tower, the fused embedding and a ``GPTModel`` with local layers, under
Megatron's data parallelism; the data are packs of photographs.

    python -m examples.train_megatron_core

Some packs of the second process have no image; its projector takes part in the reduction
nevertheless. Sizes and speed are not those of a real run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import multiprocessing as mp
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

# megatron-core warns about every optional package that it finds missing.
warnings.filterwarnings("ignore", module=r"megatron\.core\..*")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from step37_data.forward_step import Stage, model_inputs
from step37_data.prefetch import Prefetcher
from step37_data.preprocess import preprocess_packed_batch
from step37_data.provider import Step37Flickr8kSFTDataProvider
from step37_kernels import ImageForInsert, ImageInsertEmbedding

HERE = Path(__file__).resolve().parent
WORLD = 2
IMAGE_SIZE, PATCH_SIZE = 112, 14
IMAGE_ROWS = (IMAGE_SIZE // PATCH_SIZE // 2) ** 2
HIDDEN, TOWER_WIDTH, LAYERS = 64, 96, 2
PACK_LENGTH = 192
ROUNDS = 12


class VisionTower(nn.Module):
    """112 px → 8×8 patches → 4×4 rows of width C, as a channels-first view ``[N, L, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, TOWER_WIDTH // 2, PATCH_SIZE, PATCH_SIZE)
        self.merge = nn.Conv2d(TOWER_WIDTH // 2, TOWER_WIDTH, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.merge(F.gelu(self.patches(images)))
        return features.flatten(2).transpose(1, 2)


def make_model(vocabulary: int) -> Any:
    """Make tower, fused embedding and ``GPTModel``, connected as in ``Step37Model``."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Model(MegatronModule):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config=config)
            self.vision_model = VisionTower()
            # Frozen, as in the first stage of such a training: no gradient is computed for it.
            self.vision_model.requires_grad_(False)
            self.language_model = GPTModel(
                config,
                get_gpt_layer_local_spec(),
                vocab_size=vocabulary,
                max_sequence_length=2 * PACK_LENGTH,
                position_embedding_type="rope",
            )
            self.image_insert_embedding = ImageInsertEmbedding(
                self.language_model.embedding,
                TOWER_WIDTH,
                HIDDEN,
                strict=True,
                text_only_gradient=True,
            )

        def forward(
            self,
            input_ids: Tensor,
            images: list[ImageForInsert],
            labels: Tensor,
            cu_seqlens: Tensor,
        ) -> Tensor:
            """Compute the losses ``[1, T]``."""
            encoded = [
                ImageForInsert(
                    insert_start_token=group.insert_start_token,
                    image_features=self.vision_model(group.images),
                )
                for group in images
            ]
            embeddings = self.image_insert_embedding(input_ids, encoded)
            losses: Tensor = self.language_model(
                input_ids=input_ids,
                position_ids=None,
                attention_mask=hidden_pairs(cu_seqlens, input_ids.shape[1]),
                decoder_input=embeddings,
                labels=labels,
            )
            return losses

    return Model(
        TransformerConfig(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
        )
    )


def hidden_pairs(cu_seqlens: Tensor, length: int) -> Tensor:
    """Make the mask ``[1, 1, T, T]``, True for other sub-sequences and for later positions.

    For local layers. Transformer Engine takes the ``PackedSeqParams`` of ``model_inputs`` instead.
    """
    position = torch.arange(length, device=cu_seqlens.device)
    segment = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
    visible = (segment[:, None] == segment[None]) & (position[:, None] >= position[None])
    return ~visible[None, None]


def without_images(pack: dict[str, Any], start_token: int) -> dict[str, Any]:
    """Return the pack without images, and without start tokens of images."""
    tokens = pack["tokens"].clone()
    tokens[tokens == start_token] = 0
    return {**pack, "tokens": tokens, "image_paths": []}


def make_prefetcher(provider: Step37Flickr8kSFTDataProvider, packs: Any, rank: int) -> Prefetcher:
    """Make this rank's packs, without end; every third one of the second rank has no image."""
    schedule = []
    for i in range(ROUNDS * len(packs)):
        pack = packs[(i * WORLD + rank) % len(packs)]
        if rank == 1 and i % 3 == 2:
            pack = without_images(pack, provider.img_start_token_id)
        schedule.append(pack)
    prepare = functools.partial(
        model_inputs,
        stage=Stage(pre_process=True, post_process=True, divisible_by=16),
        preprocess=functools.partial(
            preprocess_packed_batch,
            img_start_token_id=provider.img_start_token_id,
            patch_start_token_id=provider.patch_start_token_id,
            image_size=provider.image_size,
            patch_image_size=provider.patch_image_size,
            encoder_patch_size=provider.encoder_patch_size,
            device="cpu",
            dtype=torch.float32,
        ),
    )
    return Prefetcher(schedule, prepare, device="cpu")


def train(rank: int, folder: str) -> list[float]:
    """Train; returns the mean loss over both ranks for each step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    provider = Step37Flickr8kSFTDataProvider(
        tokenizer_path=str(HERE / "tokenizer"),
        cache_dir=str(HERE / "flickr8k_mini"),
        lengths_cache_dir=str(Path(folder) / "lengths"),
        sample_count=None,
        image_token_count=IMAGE_ROWS,
        image_size=IMAGE_SIZE,
        max_packing_seqlen=PACK_LENGTH,
        dataset_sampling="sequential",
    )
    packs, _, _ = provider.build_datasets(None)
    torch.manual_seed(37)
    model = make_model(len(packs.datasets[0].template.tokenizer))
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(overlap_grad_reduce=True), model
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    means = []
    with make_prefetcher(provider, packs, rank) as prefetcher:
        for step, inputs in enumerate(prefetcher):
            wrapped.zero_grad_buffer()
            losses = wrapped(
                inputs["input_ids"], inputs["images"], inputs["labels"], inputs["cu_seqlens"]
            )
            mask = inputs["loss_mask"]
            loss = (losses * mask).sum() / mask.sum()
            loss.backward()
            wrapped.finish_grad_sync()
            for parameter in trained:
                parameter.grad = parameter.main_grad
            optimizer.step()
            # Autograd would add the next gradient to it, and DDP's hook that sum to main_grad.
            optimizer.zero_grad()
            mean = loss.detach() / WORLD
            dist.all_reduce(mean)
            means.append(mean.item())
            if rank == 0 and (step + 1) % 6 == 0:
                print(f"  step {step + 1:3d}  loss {sum(means[-6:]) / 6:6.3f}")
    return means


def run_rank(rank: int, folder: str) -> None:
    """Run one process: start Megatron over gloo, train, and write the losses to a file."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # megatron-core asks for the current CUDA device wherever it allocates, and forks the CUDA
    # random state around a dropout that is off here. There is no such device.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    # Newer releases ask for the stream before a reduction, to order it behind CUDA graphs.
    torch.cuda.current_stream = lambda: None  # type: ignore[assignment, misc]
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    parallel_state.initialize_model_parallel()
    means = train(rank, folder)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    torch.save(means, Path(folder) / f"losses{rank}.pt")


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        print(f"{WORLD} processes, data parallel, on the CPU")
        processes = [context.Process(target=run_rank, args=(r, folder)) for r in range(WORLD)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        stuck = [process for process in processes if process.is_alive()]
        for process in stuck:
            process.kill()
            process.join()
        if stuck or any(process.exitcode for process in processes):
            print("FAILED: a process died or did not come to an end", file=sys.stderr)
            return 1
        means, others = (torch.load(Path(folder) / f"losses{rank}.pt") for rank in range(WORLD))
    third = len(means) // 3
    first, last = sum(means[:third]) / third, sum(means[-third:]) / third
    print(f"loss {first:.3f} → {last:.3f}")
    if means != others or last > first / 2:
        print("FAILED: the ranks disagree, or the loss did not fall", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
