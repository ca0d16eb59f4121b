"""sources: all mistakes that can be known beforehand, and links to what lies here, which DVC watches."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Find the mistakes that can be known before anything runs, and link to the local sources, which DVC watches."""
    from libprune.foresight.foresee import foresee
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.sections import MOST_TEXTS
    from libprune.pipeline.sources import link_sources
    from libprune.pipeline.terminal import note

    settings = foresee(params)
    given, vocabulary = settings.recover.text, settings.prepare.vocabulary
    texts: list[str | None] = [given] if isinstance(given, str) else [share.text for share in given or ()]
    texts += [None] * (MOST_TEXTS - len(texts))
    named = {
        "model": ("prepare.model", settings.prepare.model),
        "families": ("prepare.families", settings.prepare.families),
        "vocabulary": ("prepare.vocabulary.text", vocabulary.text if vocabulary else None),
        "text": ("tokenize.text", settings.tokenize.text),
        "evaluation": ("tokenize.evaluation_text", settings.tokenize.evaluation_text),
        "teacher": ("recover.teacher", settings.recover.teacher),
        **{f"recovery-{number}": ("recover.text", text) for number, text in enumerate(texts, 1)},
        "tasks": ("evaluate.task_folder", settings.evaluate.task_folder),
    }
    for name, path in link_sources(Layout(artifacts).sources, named).items():
        note(f"{named[name][0]}: {path}")


app = stage.app(main)
if __name__ == "__main__":
    app()
