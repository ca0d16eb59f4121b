"""sources: all mistakes that can be known beforehand, and links to what lies here, which DVC watches."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Find the mistakes that can be known before anything runs, and link to the local sources, which DVC watches."""
    from libprune.foresight.foresee import foresee
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.sources import link_sources
    from libprune.pipeline.terminal import note
    from libprune.texts.shares import numbered

    settings = foresee(params)
    vocabulary = settings.prepare.vocabulary
    named = {
        "model": ("prepare.model", settings.prepare.model),
        "families": ("prepare.families", settings.prepare.families),
        "vocabulary": ("prepare.vocabulary.text", vocabulary.text if vocabulary else None),
        **numbered("text", "tokenize.text", settings.tokenize.text),
        "evaluation": ("tokenize.evaluation_text", settings.tokenize.evaluation_text),
        "teacher": ("recover.teacher", settings.recover.teacher),
        **numbered("recovery", "recover.text", settings.recover.text),
        "tasks": ("evaluate.task_folder", settings.evaluate.task_folder),
    }
    for name, path in link_sources(Layout(artifacts).sources, named).items():
        note(f"{named[name][0]}: {path}")


app = stage.app(main)
if __name__ == "__main__":
    app()
