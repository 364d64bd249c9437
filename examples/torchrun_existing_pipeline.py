"""A diffusers script of your own, with one line added: the VAE decodes on every rank of the job.

Run it with as many ranks as there are GPUs::

    torchrun --nproc-per-node 2 examples/torchrun_existing_pipeline.py --height 2048 --width 2048

Every rank runs the whole script, as under torchrun it always does: each denoises the same latents (the
same seed on all of them, which vaepp relies on), and the decode is shared.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from vaepp_sdk import parallelize_vae


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Tongyi-MAI/Z-Image-Turbo", help="hub id or local folder")
    parser.add_argument("--prompt", default="a futuristic city at sunset, high resolution, 8k")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--num-inference-steps", type=int, default=9)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("existing_pipeline.png"))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend)

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=dtype, use_safetensors=True)
    pipe.to(device)
    pipe.vae.enable_tiling()
    pipe.vae = parallelize_vae(pipe.vae)  # the one line

    images = pipe(
        arguments.prompt,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(arguments.seed),
    ).images
    if dist.get_rank() == 0:
        images[0].save(arguments.output)
        print(f"saved {arguments.output}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
