"""`idea-export`: a learned person for diffusers, AUTOMATIC1111 and ComfyUI.

    idea-export IDENTITY --to diffusers|a1111|comfyui|all --out FOLDER

Writes small safetensors files, `identity.json`, which says what belongs together, and a README.md
with what to type in each program, which is also the card of a repository on the Hugging Face Hub.
"""

import argparse
import sys
from collections.abc import Sequence

from idea_jax import launch
from idea_jax.config.reading import OneOfItsNames, flags_of
from idea_jax.runtime.files import say

PROGRAMS = ("diffusers", "a1111", "comfyui")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="idea-export",
        description="Writes a learned person for diffusers, AUTOMATIC1111 and ComfyUI.",
    )
    found.add_argument("identity", metavar="IDENTITY", help="identity.safetensors, or its folder")
    found.add_argument(
        "--to", choices=(*PROGRAMS, "all"), default="all", help="program (default: all of them)"
    )
    found.add_argument(
        *flags_of("out"),
        dest="out",
        action=OneOfItsNames,
        required=True,
        metavar="FOLDER",
        help="new, empty, or of an export",
    )
    found.add_argument(
        *flags_of("pretrained_model_name_or_path"),
        dest="pretrained_model_name_or_path",
        action=OneOfItsNames,
        metavar="MODEL",
        help="look whether the person fits this checkpoint, and take its shared ID-Enhancer",
    )
    found.add_argument(
        "--enhancer",
        metavar="FILE",
        help="the shared ID-Enhancer that the person was trained with, if they need one (default: "
        "the checkpoint's)",
    )
    found.add_argument(
        "--overwrite", action="store_true", help="replace the export of another identity"
    )
    found.add_argument(
        "--push_to_hub", metavar="REPO", help="upload the folder to this private repository"
    )
    found.add_argument(
        "--publish_consent",
        action="store_true",
        help="this person agreed that the files are uploaded",
    )
    found.add_argument("--hub_token", metavar="TOKEN", help="default: as `hf auth login` keeps it")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 where the input or the disk is at fault."""
    found = parser()
    args = found.parse_args(argv)
    if args.push_to_hub and not args.publish_consent:
        found.error(
            "--push_to_hub publishes files that draw a person: give --publish_consent as well, if "
            "that person agreed to it"
        )
    for name in ("publish_consent", "hub_token"):
        if getattr(args, name) and not args.push_to_hub:
            found.error(f"--{name} has no effect without --push_to_hub")
    args.to = PROGRAMS if args.to == "all" else (args.to,)
    return launch.run(lambda: export(args))


def export(args: argparse.Namespace) -> None:
    """Exports a person, and prints the folder.

    Raises:
      InputError, OSError: the identity or the disk is at fault.
    """
    from idea_jax import exporting
    from idea_jax.runtime import devices

    devices.check_backend()
    say(str(exporting.export(args)))


if __name__ == "__main__":
    sys.exit(main())
