"""The base of all front ends is silent, and a front end needs `say` alone."""

from lora_jax.finetune.reporter import Reporter


def test_it_says_nothing(capfd):
    out = Reporter()
    out.say("a")
    out.heading("b")
    out.facts([("c", "d")])
    out.table(("e",), [(1,)])
    with out.progress("f", 2) as tick:
        tick(1, "g")
        tick(2, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_all_that_is_said_in_lines_goes_through_say():
    said = []

    class Lines(Reporter):
        def say(self, text="", *, style=None):
            said.append((text, style))

    out = Lines()
    out.heading("Loaded")
    out.facts([("rank", "8"), ("alpha", "16")])
    out.table(("layer", "count"), [("query", 6)])
    assert said == [
        ("", None),
        ("Loaded", "bold"),
        ("  rank   8", None),
        ("  alpha  16", None),
        ("  layer  count", None),
        ("  query  6", None),
    ]
