"""All stages in order; what is up to date is skipped."""

import argparse

from ml_collections import ConfigDict

from rosepo_jax.stages import STAGES, runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Runs every stage in order; what is up to date is skipped."


def main(config: ConfigDict, args: argparse.Namespace) -> int:
    for verb in STAGES:
        runtime.execute(runtime.module(verb), config, args.workdir)
    return 0
