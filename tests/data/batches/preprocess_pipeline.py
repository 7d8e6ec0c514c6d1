"""One rank of two pipeline stages: ``python preprocess_pipeline.py RANK FOLDER PHOTO``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from step37_data.preprocess import preprocess_packed_batch


def main() -> None:
    rank, folder, photo = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    tokens = torch.tensor([7, 1, 1, 7, 1, 1])
    batch = {
        "tokens": tokens,
        "labels": tokens,
        "loss_masks": torch.ones(6),
        "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32),
        "position_id": torch.tensor([0, 1, 2, 0, 1, 2]),
        "image_paths": [(photo, 0), (str(folder / "missing.jpg"), 0)],
    }
    result = {}
    for only_first in (True, False):
        for on_broken in ("zero", "skip-loss"):
            out = preprocess_packed_batch(
                batch,
                img_start_token_id=7,
                patch_start_token_id=8,
                image_size=28,
                patch_image_size=14,
                encoder_patch_size=14,
                only_pp_first_stage=only_first,
                device="cpu",
                on_broken=on_broken,
            )
            images = sum(len(group.images) for group in out["images"])
            result[f"{only_first} {on_broken}"] = [images, out["loss_masks"][0].tolist()]
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
