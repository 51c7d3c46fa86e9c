"""The offline world: captioned drawings with a verifier (`shapes`), and the small models trained on them (`build`)."""
