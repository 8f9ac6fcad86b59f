"""Make continuous tokens of pictures by a vision model: `python -m jaxup.features MODEL DATA OUT`.

MODEL is a vision model of transformers (SigLIP, CLIP, DINO, ViT ...), directory or Hub id, of which the last hidden
state is taken; with --vae it is an AutoencoderKL of diffusers, of which the latents are. DATA is a .jsonl or .parquet
file with images and text, a dataset, or a built-in source such as digits. OUT becomes a directory with the array
[pictures, tokens, channels] and the captions, which `encoder=features` reads. It is there once it is whole.

MetaMorph's are: python -m jaxup.features google/siglip-so400m-patch14-384 DATA OUT --grid 8 --normalize
"""

from __future__ import annotations

import argparse
import re

from jaxup.errors import Parser, UserError, entry_point
from jaxup.progress import tell


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("features", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory or Hub id; no code that comes with it is run")
    add("data", metavar="DATA", help="pictures with what is said of them")
    add("out", metavar="OUT", help="directory to be made")
    add("--grid", metavar="N", default="", help="pool the tokens to N x N, or to RxC, bilinearly (as many as they are)")
    add("--normalize", action="store_true", help="make each token of length 1")
    add("--vae", action="store_true", help="MODEL is an AutoencoderKL of diffusers")
    add("--size", metavar="N", type=int, default=0, help="of a VAE: make pictures N x N pixels")
    add("--columns", metavar="C", default="", help="what DATA calls its columns: image=img,text=caption")
    add("--format", choices=["npy", "zarr"], default="npy", help="of the array (npy)")
    add("--dtype", choices=["float32", "float16"], default="float32", help="of the array (float32)")
    add("--batch", metavar="N", type=int, default=32, help="pictures at once (32)")
    add("--revision", help="of a Hub id: branch, tag or commit")
    add("--force", action="store_true", help="replace OUT if it holds features")
    args = parser.parse_args(argv[1:])
    if args.grid and not re.fullmatch("[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})?", args.grid):
        raise UserError("N or RxC, such as 8 or 4x16", at=f"--grid={args.grid}")
    if args.batch < 1:
        raise UserError("at least one picture", at=f"--batch={args.batch}")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    from jaxup.continuous.extract import extract

    sides = [int(side) for side in args.grid.split("x")] if args.grid else []
    shape = extract(
        args.model, args.data, args.out, vae=args.vae, size=args.size, grid=(sides[0], sides[-1]) if sides else None,
        normalize=args.normalize, columns=args.columns, stored=args.format, dtype=args.dtype, batch=args.batch,
        force=args.force, revision=args.revision,
    )  # fmt: skip
    tell(f"{args.out}: {' x '.join(f'{n:,}' for n in shape)} {args.dtype}; data.source={args.out} encoder=features")


if __name__ == "__main__":
    entry_point(main)
