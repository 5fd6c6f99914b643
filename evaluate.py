"""Measure checkpoints on the test set: accuracy with its interval, every metric, every class, and pairs compared.

python evaluate.py                                  # checkpoints/best_cnn_fmnist.pt
python evaluate.py A.pt B.pt --json comparison.json # side by side, with McNemar's exact test
python evaluate.py A.pt --tta                       # also with the mean answer to six views of each image
python evaluate.py --ensemble A.pt B.pt             # also the mean answer of all of them
python evaluate.py A.pt --exclude suspects.csv      # also without the images that are listed there
python evaluate.py A.pt --images F.npy --labels L.npy
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from analysis.lines import accuracies, accuracy, measured_on, print_columns
from runtime import cli
from runtime.errors import UserError, one_line

OF_DATA = ("split", "exclude", "data_dir", "other_data")  # flags that have no meaning for arrays


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """Read the flags."""
    parser = cli.Parser("Evaluate checkpoints on Fashion-MNIST.")
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="*",
        type=Path,
        default=[cli.DEFAULT_CHECKPOINT],
        help="one, or several to compare (default: checkpoints/best_cnn_fmnist.pt)",
    )
    parser.add_argument("--split", choices=("test", "val", "train"), help="images to measure on (default: test)")
    parser.add_argument(
        "--exclude",
        metavar="FILE.csv",
        type=Path,
        help="measure the accuracy also without the images listed there: columns split (train or test) and index",
    )
    for flag, what in {"--images": "(n, 28, 28), light on black", "--labels": "(n,), 0 to 9"}.items():
        text = f"measure on these {flag[2:]} instead: uint8 {what}; --images and --labels go together"
        parser.add_argument(flag, metavar="FILE.npy", type=Path, help=text)
    parser.add_argument(
        "--tta",
        action="store_true",
        help="measure also the mean answer to six views of each image: mirrored, moved by a pixel",
    )
    parser.add_argument("--ensemble", action="store_true", help="measure also the mean answer of all checkpoints given")
    parser.add_argument(
        "--json", metavar="FILE.json", type=cli.file_to_write(".json"), help="write everything measured there"
    )
    cli.add_bare(parser)
    cli.add_common(parser)
    args = parser.parse_args(argv)
    of_data = [f"--{name.replace('_', '-')}" for name in OF_DATA if getattr(args, name) not in (None, False)]
    if (args.images is None) != (args.labels is None):
        parser.error("--images and --labels go together: a file of each")
    if args.images and of_data:
        parser.error(f"--images and --labels take the place of the data set: leave out {', '.join(of_data)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, compare and print. Returns the exit code."""
    args = parse_args(argv)
    with cli.loading():  # only now: --help should not wait for PyTorch
        import checkpoint
        from analysis import evaluation
        from runtime import device, files

    if args.ensemble and len(args.checkpoints) < 2:
        raise UserError("--ensemble needs two checkpoints or more")
    target = device.pick_device(args.device)
    loaded = evaluation.load(args.checkpoints, checkpoint.Bare(args.model, args.mean, args.std))
    split, listed, files_read = evaluation.choose_images(args, loaded)
    for each in loaded:
        checkpoint.check_classes(each.path, each.info, split)
    answers = evaluation.answer(loaded, split.to(target), args.tta, args.ensemble)
    results = [evaluation.describe(each, split, listed) | files_read for each in answers]
    content = results[0]
    if len(results) == 1:
        print_one(content)
    else:
        correct = [(each.logits.argmax(1) == split.labels).numpy() for each in answers]
        groups = evaluation.alike_but_for_seed(results)
        content = {"checkpoints": results, "means": evaluation.spread(groups)}
        if pairs := evaluation.pairs(groups):
            content |= {"paired": pairs}
        content |= {"mcnemar": evaluation.compare(results, correct)}
        print_several(content)
    if args.json:
        files.write_json(args.json, content)
        print(f"\nwritten to {cli.shown(args.json)}")
    return 0


def print_one(result: dict[str, Any]) -> None:
    """Print the figures of one checkpoint and of every class."""
    import metrics
    from checkpoint import normalisation

    training = result["training"]
    described = [f"seed {training['seed']}, epoch {training['epoch']}"] if training["epoch"] else []
    described += [f"fold {fold}"] if (fold := (training["flags"] or {}).get("fold")) else []
    print(f"\n{one_line(result['checkpoint'])}: {', '.join([result['model'], *described])}")
    if "normalisation" in result:
        print(cli.wrapped(f"its input is normalised by {normalisation(result)}"))
    print(measured_on(result))
    for key, metric in metrics.METRICS.items():
        figure = accuracy(result) if key == "accuracy" else f"{_number(result[key])} {metric.unit}"
        print(f"  {metric.title:<26}  {figure.rstrip()}")
        if key == "accuracy" and "without" in result:
            print(f"  {'accuracy without these':<26}  {accuracy(result['without'])}")
    if result["caution"]:
        print(cli.wrapped(f"  caution: {result['caution']}"))
    width = max(map(len, ("class", *result["per_class"])))
    print(f"\n{'class':<{width}} {'precision':>9} {'recall':>7} {'F1':>7} {'images':>7}")
    for title, row in result["per_class"].items():
        print(f"{title:<{width}} {row['precision']:>9.1%} {row['recall']:>7.1%} {row['f1']:>7.1%} {row['support']:>7,}")


def print_several(content: dict[str, Any]) -> None:
    """Print a table of the results, means of those trained alike, and the comparison of pairs."""
    import metrics
    from analysis.evaluation import name
    from checkpoint import normalisation

    results = content["checkpoints"]
    print(f"\n{measured_on(results[0])}\n")
    for number, result in enumerate(results, 1):
        print(f"{number:>2}  {one_line(name(result))}: {result['model']}")
        if "normalisation" in result:
            print(cli.wrapped(f"    its input is normalised by {normalisation(result)}"))
    columns = accuracies(results)
    for key in metrics.METRICS:
        if key not in columns:
            columns[key.replace("_", " ")] = [_number(result[key]) for result in results]
    print_columns(columns)
    cautions: dict[str, list[str]] = {}
    for number, result in enumerate(results, 1):
        if result["caution"]:
            cautions.setdefault(result["caution"], []).append(str(number))
    for caution, numbers in cautions.items():
        print(cli.wrapped(f"caution, {', '.join(numbers)}: {caution}"))
    print_means(content["means"])
    print_paired(content.get("paired", []))
    print_pairs(content["mcnemar"], len(results))


def print_means(means: list[dict[str, Any]]) -> None:
    """Print the mean accuracies of checkpoints that were trained alike, and which files repeat a seed."""
    for group in means:
        views = f"{group['views']} views, " if group["views"] > 1 else ""
        differs = f", {group['differs']}" if "differs" in group else ""
        text = f"{group['model']}, recipe {group['recipe']}, selected on {group['select']}{differs}: {views}"
        if group["n"] > 1:
            text += (
                f"mean {group['mean_accuracy']:.2%}, standard deviation {group['sd']:.2%}, 95% interval of the mean "
            )
            text += "{:.2%} to {:.2%}".format(*group["ci95"]) + f", n = {group['n']} checkpoints"
        else:
            text += "one seed, so no mean"
        for path in group.get("repeats", []):
            text += f"; {path} repeats a seed and does not count"
        print(f"\n{cli.wrapped(one_line(text))}")


def print_paired(pairs: list[dict[str, Any]]) -> None:
    """Print how the means differ over common seeds, of evaluation.pairs."""
    if pairs:
        correction = f", p with Holm's correction for {len(pairs)}" if len(pairs) > 1 else ""
        head = f"Against {pairs[0]['against']}, the best mean: paired t test over common seeds{correction}"
        print("\n" + cli.wrapped(one_line(head)))
    for pair in pairs:
        print(cli.wrapped(one_line(f"{pair['name']}: {pair['text']}")))


def print_pairs(pairs: list[dict[str, Any]], n: int) -> None:
    """Print McNemar's test of each pair of n results, numbered from 1."""
    print("\nMcNemar's exact test: images that only one of the two gets right")
    for (a, b), pair in zip(combinations(range(1, n + 1), 2), pairs, strict=True):
        holm = f"   with Holm's correction {_rounded(pair['p_holm'])}" if len(pairs) > 1 else ""
        p = _rounded(pair["p_value"])
        print(f"{a:>2} against {b:>2}: {pair['only_a']:>5,} to {pair['only_b']:>5,}   p = {p}{holm}")


def _number(figure: float) -> str:
    return f"{figure:.4f}" if abs(figure) < 1e6 else f"{figure:.3g}"


def _rounded(p: float) -> str:
    return f"{p:.2g}" if p else "under 1e-300"  # which a float cannot hold


if __name__ == "__main__":
    cli.run(main)
