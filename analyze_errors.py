"""Show what a checkpoint gets wrong: figures/*.png, and the numbers behind them in figures/analysis.json.

python analyze_errors.py                       # checkpoints/best_cnn_fmnist.pt
python analyze_errors.py OTHER.pt --figures-dir other
"""

from pathlib import Path

import cli

SHOWN_MISTAKES = 25
SHOWN_PAIRS = 10


def parse_args(argv=None):
    parser = cli.Parser("Analyse the mistakes of a checkpoint on the test set.")
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        type=Path,
        default=cli.DEFAULT_CHECKPOINT,
        help="default: checkpoints/best_cnn_fmnist.pt",
    )
    parser.add_argument("--figures-dir", metavar="DIR", type=Path, default=cli.FIGURES, help="default: figures")
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import checkpoint
    import data
    import engine
    import errors
    import plots
    from record import history_of

    device = engine.pick_device(args.device)
    model, info = checkpoint.load(args.checkpoint)
    args.figures_dir.mkdir(parents=True, exist_ok=True)
    (test,) = data.load("test", data_dir=args.data_dir)
    logits = engine.predict_logits(model.to(device), test.to(device))
    measured = engine.metrics(logits, test.labels)
    mistakes = errors.most_confident_mistakes(logits.double().softmax(1).numpy(), test.labels.numpy())
    of_shirt = [mistake for mistake in mistakes if errors.in_shirt_group(mistake)]
    pairs = errors.confused_pairs(mistakes)
    history = history_of(args.checkpoint)
    analysis = {
        "checkpoint": args.checkpoint.name,
        "checkpoint_sha256": checkpoint.file_sha256(args.checkpoint),
        "model": info["model"],
        "split": test.name,
        "data": test.source,
        **{key: measured[key] for key in ("n", "accuracy", "accuracy_ci95", "confusion_matrix")},
        "mistakes": len(mistakes),
        "findings": errors.check_findings(mistakes),
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
    for name, content in pictures.items():
        checkpoint.write_atomically(args.figures_dir / name, content)
    checkpoint.write_json(args.figures_dir / "analysis.json", analysis)

    low, high = measured["accuracy_ci95"]
    print(
        f"\n{cli.shown(args.checkpoint)}: {info['model']}, accuracy {measured['accuracy']:.2%} "
        f"(95% interval {low:.2%} to {high:.2%}), {len(mistakes):,} mistakes in {measured['n']:,} test images\n"
    )
    for finding in analysis["findings"]:
        print(f"{finding['finding']}: {'confirmed' if finding['holds'] else 'not confirmed'}")
        print(f"    {finding['summary']}")
    print("\nmost confused: " + ", ".join(f"{pair['a']} and {pair['b']} {pair['total']}" for pair in pairs[:5]))
    print(f"written to {cli.shown(args.figures_dir)}: {', '.join([*pictures, 'analysis.json'])}")
    stale = args.figures_dir / "training_curves.png"
    if not history:
        print("no training curves: there is no history of this very checkpoint beside it")
        if stale.exists():
            stale.unlink()
            print(f"{cli.shown(stale)} was of another checkpoint and is removed")
    return 0


if __name__ == "__main__":
    cli.run(main)
