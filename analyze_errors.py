"""Show what checkpoints get wrong and what their mistakes are made of: figures/report.html, *.png and analysis.json.

python analyze_errors.py                       # checkpoints/best_cnn_fmnist.pt
python analyze_errors.py A.pt B.pt --figures-dir other   # side by side, and where they disagree
python analyze_errors.py --deep                # first train the folds and seeds that the report compares with: hours
"""

import sys
from pathlib import Path

import cli

SHOWN_MISTAKES = 25
SHOWN_PAIRS = 10
MOST_CHECKPOINTS = 5  # that fit into a page of 8 MB


def parse_args(argv=None):
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
        help="first do the trainings that have no result yet (five folds, and five seeds of every model and recipe): "
        "hours, which may be interrupted and gone on with by the same command",
    )
    parser.add_argument(
        "--deep-dir", metavar="DIR", type=Path, default=cli.DEEP, help="where their results are (default: runs/deep)"
    )
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from tqdm import tqdm

    import checkpoint
    import data
    import deep
    import engine
    import errors
    import explain
    import plots
    import report
    from record import history_of

    if len(args.checkpoints) > MOST_CHECKPOINTS:
        raise data.UserError(f"{len(args.checkpoints)} checkpoints are too many: up to {MOST_CHECKPOINTS} are compared")
    device = engine.pick_device(args.device)
    loaded = [(path, *checkpoint.load(path)) for path in args.checkpoints]
    args.figures_dir.mkdir(parents=True, exist_ok=True)
    if args.deep and (stopped := deep.run(args.deep_dir, args.data_dir, args.device)):
        print("analyze_errors.py: interrupted; the same command goes on with it", file=sys.stderr)
        return stopped
    train, val, test = data.load("train+val", "val", "test", data_dir=args.data_dir)
    results = deep.Results(args.deep_dir, data.fingerprint(train, test))
    on_device = [split.to(device) for split in (train, val, test)]
    measured_all = []
    for path, model, info in tqdm(loaded, desc="checkpoints", disable=None):
        unfit = why_no_temperature(info, val)
        measured_all.append(report.measure(cli.shown(path), model.to(device), info, on_device[2], on_device[1], unfit))
    first, info = measured_all[0], loaded[0][2]
    _, train_features = explain.features(loaded[0][1], on_device[0])
    embedding = results.embedding(checkpoint.file_sha256(args.checkpoints[0]), first["features"] if args.deep else None)
    page, numbers = report.assemble(measured_all, train_features, train, test, results, embedding)
    if results.stale:
        print(
            f"deep results of other code or recipes are passed over: {', '.join(sorted(set(results.stale)))}; --deep "
            "makes them anew",
            file=sys.stderr,
        )
    measured, mistakes = first["metrics"], first["mistakes"]
    of_shirt = [mistake for mistake in mistakes if errors.in_shirt_group(mistake)]
    pairs = errors.confused_pairs(mistakes)
    history = history_of(args.checkpoints[0])
    analysis = {
        "checkpoint": args.checkpoints[0].name,
        "checkpoint_sha256": checkpoint.file_sha256(args.checkpoints[0]),
        "model": info["model"],
        "split": test.name,
        "data": test.source,
        **{key: measured[key] for key in ("n", "accuracy", "accuracy_ci95", "confusion_matrix")},
        "mistakes": len(mistakes),
        "findings": first["findings"],
        "report": numbers,
        "confused_pairs": pairs,
        "confident_mistakes": mistakes[:SHOWN_MISTAKES],
        "shirt_mistakes": of_shirt[:SHOWN_MISTAKES],
    }

    title = f"{info['model']}: {len(mistakes):,} mistakes in {measured['n']:,} test images"

    def grid(shown, title):
        return plots.mistakes([test.images[mistake["index"]] for mistake in shown], shown, title)

    pictures = {
        "confusion_matrix.png": plots.confusion_matrix(measured["confusion_matrix"], title),
        "confused_pairs.png": plots.confused_pairs(pairs[:SHOWN_PAIRS], len(mistakes)),
        "confident_mistakes.png": grid(mistakes[:SHOWN_MISTAKES], "The most confident mistakes"),
        "shirt_mistakes.png": grid(
            of_shirt[:SHOWN_MISTAKES], "Shirt against T-shirt/top, Pullover and Coat: the most confident mistakes"
        ),
    }
    if history:
        pictures["training_curves.png"] = plots.training_curves(history)
    pictures["report.html"] = report.render(page)
    for name, content in pictures.items():
        checkpoint.write_atomically(args.figures_dir / name, content)
    checkpoint.write_json(args.figures_dir / "analysis.json", analysis)

    low, high = measured["accuracy_ci95"]
    print(
        f"\n{cli.shown(args.checkpoints[0])}: {info['model']}, accuracy {measured['accuracy']:.2%} "
        f"(95% interval {low:.2%} to {high:.2%}), {len(mistakes):,} mistakes in {measured['n']:,} test images\n"
    )
    for finding in analysis["findings"]:
        print(f"{finding['finding']}: {'confirmed' if finding['holds'] else 'not confirmed'}")
        print(f"    {finding['summary']}")
    print("\nwhat they are made of:")
    for name, share in numbers["checkpoints"][0]["groups"].items():
        print(f"    {page['groups'][name]}: {errors.told(share)}")
    for note in page["notes"]:
        print(note)
    print("\nmost confused: " + ", ".join(f"{pair['a']} and {pair['b']} {pair['total']}" for pair in pairs[:5]))
    print(f"written to {cli.shown(args.figures_dir)}: {', '.join([*pictures, 'analysis.json'])}")
    stale = args.figures_dir / "training_curves.png"
    if not history:
        print("no training curves: there is no history of this very checkpoint beside it")
        if stale.exists():
            stale.unlink()
            print(f"{cli.shown(stale)} was of another checkpoint and is removed")
    return 0


def why_no_temperature(info, val):
    """Why the validation images cannot tell the checkpoint's temperature, or None where they can."""
    if "flags" not in info:
        return "how it was trained is not known, nor whether it saw the validation images"
    if info["data"] != val.source:
        return f"it was trained on {info['data']}, and these are {val.source}"
    if info["flags"].get("select") != "val":
        return "it was trained on the validation images too"
    return None


if __name__ == "__main__":
    cli.run(main)
