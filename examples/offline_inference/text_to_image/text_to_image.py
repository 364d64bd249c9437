"""Text to image from a plain script: vaepp starts the ranks, so no torchrun is needed.

The real model on two GPUs::

    python examples/offline_inference/text_to_image/text_to_image.py \
        --model Tongyi-MAI/Z-Image-Turbo \
        --prompt "a futuristic city at sunset, high resolution, 8k" \
        --height 1152 --width 1152 \
        --tensor-parallel-size 2 --vae-patch-parallel-size 2 --vae-use-tiling \
        --num-inference-steps 9 --seed 7 --output city.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vaepp_sdk import Pipeline, VaeppError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Tongyi-MAI/Z-Image-Turbo", help="hub id or local folder")
    parser.add_argument("--prompt", default="a futuristic city at sunset, high resolution, 8k")
    parser.add_argument("--height", type=int, default=1024, help="pixels, a multiple of 16")
    parser.add_argument("--width", type=int, default=1024, help="pixels, a multiple of 16")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks that share the DiT")
    parser.add_argument("--vae-patch-parallel-size", type=int, default=1, help="ranks that share the VAE")
    parser.add_argument("--vae-use-tiling", action="store_true", help="the VAE's own tiling")
    parser.add_argument("--num-inference-steps", type=int, default=9)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("text_to_image.png"))
    return parser.parse_args()


def spec(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same declaration as a TOML spec, as a dict."""
    vae = {"vae_use_tiling": True} if arguments.vae_use_tiling else {}
    return {
        "model": {"id": arguments.model},
        "parallel": {
            "tensor_parallel_size": arguments.tensor_parallel_size,
            "vae_patch_parallel_size": arguments.vae_patch_parallel_size,
        },
        "vae": vae,
        "call": {
            "prompt": arguments.prompt,
            "height": arguments.height,
            "width": arguments.width,
            "num_inference_steps": arguments.num_inference_steps,
            "guidance_scale": 0.0,  # Turbo is distilled to run without guidance
            "seed": arguments.seed,
        },
    }


def main() -> None:
    arguments = parse_arguments()
    try:
        with Pipeline.from_spec(spec(arguments)) as pipe:
            result = pipe()
    except VaeppError as error:
        raise SystemExit(str(error)) from error
    result.images[0].save(arguments.output)
    for stage in result.stages[0]:  # rank 0's
        print(f"{stage.stage:<14} {stage.seconds:7.2f} s")
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
