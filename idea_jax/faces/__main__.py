"""The command `python -m idea_jax.faces`: computes the faces of many pictures once.

Training then needs neither the face models nor onnxruntime.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from idea_jax import launch
from idea_jax.config.reading import OneOfItsNames, flags_of
from idea_jax.config.settings import ConfigError, check_finding, check_sources
from idea_jax.data import folders, images, people
from idea_jax.faces import models as face_models
from idea_jax.faces import packs
from idea_jax.faces import table as face_table
from idea_jax.faces.finding import about_of, detector_beside, open_finder
from idea_jax.faces.models import FaceError, check_select
from idea_jax.faces.precompute import precompute, read_table
from idea_jax.runtime.files import check_writable, file_digest, say

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the precomputation; returns the exit code, 1 if no picture had a face."""
    args = _parser().parse_args(argv)
    try:
        check_sources("a folder", args.folder, args.dataset, args.dataset_dir)
        if args.identities is not None and args.dataset is None:
            raise ConfigError("--identities has no effect without --dataset")
        check_finding(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    goes_on = f"interrupted; the same command goes on with {args.out}"
    return launch.run(lambda: compute(args), needs_jax=False, interrupted=goes_on)


def compute(args: argparse.Namespace) -> int:
    """Writes the table; returns the exit code.

    Raises:
      FaceError, ImageError, PeopleError, WriteError: the models, the pictures or the table cannot
        be used.
    """
    check_select(args.face_select)
    pictures = _pictures(args)
    if args.out.is_dir():
        raise FaceError(
            f"--out {args.out} is a folder; give a file, such as {args.out}/faces.safetensors"
        )
    check_writable(args.out.resolve().parent)
    if args.out.exists():
        face_table.read(args.out)  # a file that is no table is refused before any download
    face_model = packs.find_recogniser(
        args.face_model, args.face_model_dir, None, accept_licence=args.accept_face_licence
    )
    if args.out.exists():  # and one of other models before these are loaded
        detector = None if args.pre_aligned else detector_beside(face_model)
        digests = _digest(face_model), _digest(detector)
        read_table(args.out, about_of(*digests, args.face_select, args.pre_aligned))
    finder = open_finder(
        face_model,
        provider=args.face_provider,
        select=args.face_select,
        pre_aligned=args.pre_aligned,
    )
    failed = precompute(pictures, args.out, finder)
    if len(failed) == len(pictures):
        return 1
    say(str(args.out))
    return 0


def _pictures(args: argparse.Namespace) -> list:
    if args.dataset is None:
        paths, skipped = folders.list_tree(args.folder)
        folders.report_skipped(skipped)
        return [images.PictureFile(path) for path in paths]
    people.places(args.identities)  # it takes minutes until they are needed
    log.info(people.LICENCE)
    chosen = people.choose(people.from_celeb_a(args.dataset_dir), args.identities)
    return [picture for pictures in chosen.values() for picture in pictures]


def _digest(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file_digest(file)
    except OSError as error:
        raise FaceError(f"the face model {file} cannot be read: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="idea-faces",
        description="Compute the face embeddings of a folder of photos, and of its sub-folders, or "
        "of a data set, once; training reads them with --face_embeddings. The same command goes on "
        "where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="folder of photos, or of one folder per person"
    )
    parser.add_argument("--dataset", choices=("celeb_a",), help="data set, instead of a folder")
    parser.add_argument(
        "--dataset_dir", help="folder in which tensorflow-datasets prepared it, as array_record"
    )
    parser.add_argument("--identities", help="people of the data set, FROM:TO (default: all)")
    parser.add_argument(
        *flags_of("out"),
        dest="out",
        action=OneOfItsNames,
        type=Path,
        required=True,
        help="the .safetensors file to write",
    )
    parser.add_argument("--face_model_dir", help="folder of an insightface pack")
    parser.add_argument("--face_model", help="ArcFace model; its detector lies beside it")
    parser.add_argument("--accept_face_licence", action="store_true", help="allow the download")
    parser.add_argument("--face_provider", choices=tuple(face_models.PROVIDERS), default="cpu")
    parser.add_argument("--face_select", default="largest", help="which of several faces")
    parser.add_argument("--pre_aligned", action="store_true", help="photos are 112x112 crops")
    return parser


if __name__ == "__main__":
    sys.exit(main())
