"""Show what checkpoints get wrong and what their mistakes are made of: figures/report.html, *.png and analysis.json.

python analyze_errors.py                                 # checkpoints/best_cnn_fmnist.pt
python analyze_errors.py A.pt B.pt --figures-dir other   # side by side, and where they disagree
python analyze_errors.py --human-votes fmh_counts.csv    # compare with what people see in the test images
python analyze_errors.py --deep                # first train the folds and seeds that the report compares with: hours
python analyze_errors.py --export runs/audit   # also write suspect labels, near-duplicates and shared mistakes as CSV
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runtime import cli, files
from runtime.errors import UserError

MOST_CHECKPOINTS = 5  # that fit into a page of 8 MB


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """Read the flags."""
    parser = cli.Parser("Analyse the mistakes of a checkpoint on the test set.")
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="*",
        type=Path,
        default=[cli.DEFAULT_CHECKPOINT],
        help="one, or up to five to compare; the *.png are of the first (default: checkpoints/best_cnn_fmnist.pt)",
    )
    parser.add_argument("--figures-dir", metavar="DIR", type=Path, default=cli.FIGURES, help="default: figures")
    parser.add_argument(
        "--deep",
        action="store_true",
        help="first run the trainings that have no result yet (five folds, and five seeds of every model and recipe): "
        "hours; if interrupted, the same command resumes them",
    )
    parser.add_argument(
        "--deep-dir", metavar="DIR", type=Path, default=cli.DEEP, help="where their results are (default: runs/deep)"
    )
    parser.add_argument(
        "--human-votes",
        metavar="FILE.csv",
        type=Path,
        help="compare with people's votes on the test images: fmh_counts.csv of Fashion-MNIST-H (docs/mistakes.md)",
    )
    parser.add_argument(
        "--export",
        metavar="DIR",
        type=Path,
        help="also write the suspect labels, the near-duplicates and the mistakes of all trainings there, as CSV files "
        "with a README.md; needs what --deep gives",
    )
    cli.add_bare(parser)
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse, write and print. Returns the exit code."""
    args = parse_args(argv)
    check(args)
    with cli.loading():  # only now: --help should not wait for PyTorch
        import checkpoint
        import data
        from analysis import audit, composition, evaluation, explain, humans, report, trainings
        from runtime import device
        from training.record import history_of

    target = device.pick_device(args.device)
    if args.export:
        audit.check(args.export)
    loaded = evaluation.load(args.checkpoints, checkpoint.Bare(args.model, args.mean, args.std))
    train, test = data.load("train+val", "test", data_dir=args.data_dir, other_data=args.other_data)
    for each, _, info in loaded:
        checkpoint.check_classes(each, info, test)
    votes = args.human_votes and humans.read_votes(args.human_votes, test.labels.numpy())
    where = {"data_dir": args.data_dir, "other_data": args.other_data}
    if args.deep and (code := trainings.run(args.deep_dir, train, test, args.device, votes, **where)):
        print("analyze_errors.py: interrupted; the same command resumes it", file=sys.stderr)
        return code

    measured = composition.measure_all(loaded, test.to(target), data.held_out(train).to(target))
    (path, model, info), first = loaded[0], measured[0]
    digest, (_, train_features) = info["sha256"], explain.features(model, train.to(target))
    results = trainings.Results(args.deep_dir, data.fingerprint(train, test))
    evidence = composition.gather(first, train_features, train, test, results)
    people = composition.people(measured, evidence, votes) if votes else results.people(digest, evidence.answers_sha256)
    if args.deep:
        results.keep(digest, first.features, people if votes else None)
    numbers, embedding = composition.numbers(measured, evidence, people), results.embedding(digest, len(test.labels))
    print_stale(results.stale)

    summary = report.summary(path, digest, first, numbers, test)
    audited = audit.contents(summary, first, evidence, train_features, train, test) if args.export else {}
    with ThreadPoolExecutor(1) as pool:  # the page's pictures are packed meanwhile: two seconds less
        drawing = pool.submit(report.figures, first, test, history_of(path), people)
        page = report.page(measured, evidence, numbers, train, test, embedding, votes)
    figures = {**drawing.result(), "report.html": report.render(page)}
    figures["analysis.json"] = files.to_json(summary).encode()
    written = {args.figures_dir: figures}
    if args.export:
        written[args.export] = written.get(args.export, {}) | audited
    write(written)
    print_summary(summary, page)
    print("\n".join(f"written to {cli.shown(folder)}: {', '.join(written[folder])}" for folder in written))
    remove_stale(args.figures_dir, figures)
    return 0


def check(args: Any) -> None:
    """Raise UserError for too many checkpoints, and for a folder that cannot be written to."""
    if len(args.checkpoints) > MOST_CHECKPOINTS:
        raise UserError(f"{len(args.checkpoints)} checkpoints are too many: up to {MOST_CHECKPOINTS} are compared")
    for folder in filter(None, (args.figures_dir, args.deep and args.deep_dir, args.export)):
        files.check_folder(folder)


def print_stale(names: set[str]) -> None:
    """Say which results of long trainings are skipped, if there are any."""
    if names:
        listed = ", ".join(sorted(names))
        print(f"deep results of other code or recipes are skipped: {listed}; --deep makes them again", file=sys.stderr)


def write(written: dict[Path, dict[str, bytes]]) -> None:
    """Write files into folders, which are made where they are missing; written: by folder and file name."""
    for folder, contents in written.items():
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            files.write_atomically(folder / name, content)


def print_summary(summary: dict[str, Any], page: dict[str, Any]) -> None:
    """Print the summary of the first checkpoint; both arguments are of analysis.report."""
    from analysis.mistakes import in_words

    (low, high), first = summary["accuracy_ci95"], summary["report"]["checkpoints"][0]
    print(
        f"\n{first['name']}: {summary['model']}, accuracy {summary['accuracy']:.2%} "
        f"(95% interval {low:.2%} to {high:.2%}), {summary['mistakes']:,} mistakes in {summary['n']:,} test images\n"
    )
    for finding in summary["findings"] or []:
        print(f"{finding['finding']}: {finding['verdict']}")
        print(f"    {finding['summary']}\n    other trainings: {finding['seeds']}")
    for verdict, meaning in (page["verdicts"] or {}).items():
        print(f"{verdict}: {meaning}")
    print("\nwhat they are made of:")
    for name, share in first["groups"].items():
        print(f"    {page['groups'][name]}: {in_words(share)}")
    for note in page["notes"]:
        print(note)
    if page["people"]:
        own = page["people"]["checkpoints"][0]["mistakes"]
        print(
            f"people's votes, on its mistakes: their choice is its answer on {in_words(own['model'])}, the label on "
            f"{in_words(own['label'])}"
        )
    pairs = [f"{pair['a']} and {pair['b']} {pair['total']}" for pair in summary["confused_pairs"][:5]]
    print("\nmost confused: " + ", ".join(pairs))


def remove_stale(folder: Path, written: dict[str, bytes]) -> None:
    """Remove the figures of another checkpoint that this one does not have, and say so."""
    if "training_curves.png" not in written:
        print("no training curves: the history of this checkpoint's run is not beside it")
    people = ("people_sides.png", "people_entropy.png", "people_trainings.png")
    for name in ("training_curves.png", "shirt_mistakes.png", *people):
        if name not in written and (folder / name).exists():
            (folder / name).unlink()
            print(
                f"{cli.shown(folder / name)} was of an earlier call, with another checkpoint or votes, and is removed"
            )


if __name__ == "__main__":
    cli.run(main)
