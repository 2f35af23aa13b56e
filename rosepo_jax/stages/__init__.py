"""One file a verb: reads the config, calls the rooms, writes artefacts."""

STAGES = ("prepare", "oracle", "sft", "pairs", "align", "evaluate", "report")
