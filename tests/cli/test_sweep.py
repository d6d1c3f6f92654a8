"""`lora-jax sweep`: its words, and what it says of bad ones."""

from lora_jax.cli import sweep as command
from lora_jax.cli.console import Console
from lora_jax.cli.parser import parse
from lora_jax.finetune.sweep import Sweep


def test_the_grid_may_follow_the_options():
    args = parse(["sweep", "a.yaml", "--zip", "seed=0..2", "--together", "2", "x.y=1"])
    assert args.grid == ["seed=0..2", "x.y=1"]
    assert (args.zip, args.together, args.resume) == (True, 2, False)


def test_a_bad_grid_is_an_error_of_the_user(config, call):
    code, _, shown = call("sweep", config, "train.learning_rat=1e-2,3e-3")
    assert code == 2
    assert "Did you mean 'train.learning_rate'?" in shown
    code, _, shown = call("sweep", config)
    assert code == 2
    assert "no setting is given" in shown


def test_the_runs_are_a_table_the_best_first(config, tmp_path, monkeypatch, capsys):
    lines = [
        {
            "name": f"00{i}_rank={rank}",
            "values": {"lora.rank": rank},
            "status": status,
            "validation": loss and {"step": 8, "loss": loss},
            "test": None,
        }
        for i, (rank, status, loss) in enumerate(
            [("4", "done", 0.5), ("2", "diverged", None)]
        )
    ]
    done = Sweep(tmp_path, lines, "loss", None)
    monkeypatch.setattr(command, "sweep", lambda *args, **options: done)
    args = parse(["sweep", str(config), "lora.rank=2,4"])
    result = command.run(args, Console())
    shown = capsys.readouterr().out
    assert result["runs"] == lines
    assert shown.index("0.5000") < shown.index("diverged")
    assert "--split validation" in shown
    assert "matplotlib" in shown
