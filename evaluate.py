"""Measure checkpoints on the test set: accuracy with its interval, calibration, every class, and pairs compared.

python evaluate.py                                  # checkpoints/best_cnn_fmnist.pt
python evaluate.py A.pt B.pt --json comparison.json # side by side, with McNemar's exact test
python evaluate.py A.pt --tta                       # also with the mean answer to six views of each image
python evaluate.py --ensemble A.pt B.pt             # also the mean answer of all of them
"""

from itertools import combinations
from pathlib import Path

import numpy as np

import cli


def parse_args(argv=None):
    parser = cli.Parser("Evaluate checkpoints on Fashion-MNIST.")
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="*",
        type=Path,
        default=[cli.DEFAULT_CHECKPOINT],
        help="one, or several to compare (default: checkpoints/best_cnn_fmnist.pt)",
    )
    parser.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="images to measure on (default: %(default)s)"
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="measure also the mean answer to six views of each image: mirrored, moved by a pixel",
    )
    parser.add_argument("--ensemble", action="store_true", help="measure also the mean answer of all checkpoints given")
    parser.add_argument(
        "--json", metavar="FILE.json", type=cli.file_to_write(".json"), help="write everything measured there"
    )
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import checkpoint
    import data
    import engine
    from record import history_path

    if args.json and args.json.resolve() in [history_path(path).resolve() for path in args.checkpoints]:
        raise data.UserError(f"--json {args.json} would replace the history of a run; choose another name")
    if args.ensemble and len(args.checkpoints) < 2:
        raise data.UserError("--ensemble needs two checkpoints or more")
    device = engine.pick_device(args.device)
    loaded = [(path, *checkpoint.load(path)) for path in args.checkpoints]
    (split,) = data.load(args.split, data_dir=args.data_dir)
    answers = answer(loaded, split.to(device), args.tta, args.ensemble)
    results = [describe(loaded, split, views, members, logits) for views, members, logits in answers]
    if len(results) == 1:
        content = results[0]
        print_one(content, engine.ECE_BINS)
    else:
        correct = [(logits.argmax(1) == split.labels).numpy() for _, _, logits in answers]
        pairs = [
            {"a": name(results[i]), "b": name(results[j]), **engine.mcnemar(correct[i], correct[j])}
            for i, j in combinations(range(len(results)), 2)
        ]
        content = {"checkpoints": results, "means": spread(results), "mcnemar": pairs}
        print_several(content)
    if args.json:
        checkpoint.write_json(args.json, content)
        print(f"\nwritten to {cli.shown(args.json)}")
    return 0


def answer(loaded, split, tta, ensemble):
    """What is to be measured: (views of each image, the places in `loaded` of the models, their mean logits)."""
    from tqdm import tqdm

    import engine

    answers = []
    with tqdm(total=len(loaded) * (1 + tta * len(engine.VIEWS)), unit=" views", disable=None, leave=False) as bar:
        for views in (1, len(engine.VIEWS)) if tta else (1,):
            logits = []
            for _, model, _ in loaded:
                model.to(split.labels.device)
                if views == 1:
                    logits.append(engine.predict_logits(model, split))
                    bar.update()
                else:
                    logits.append(engine.predict_views(model, split, bar.update))
            answers += [(views, [place], each) for place, each in enumerate(logits)]
            if ensemble:
                answers.append((views, list(range(len(loaded))), engine.average(logits)))
    return answers


def describe(loaded, split, views, members, logits):
    """All that is measured of one answer, and of where it is from: a dict for the JSON."""
    import checkpoint
    import engine

    infos = [loaded[place][2] for place in members]
    cautions = [told for info in infos if (told := caution(info, split))]
    training = [{key: info.get(key) for key in ("data", "epoch", "seed", "flags", "versions", "git")} for info in infos]
    result = {"views": views, "split": split.name, "data": split.source, **engine.metrics(logits, split.labels)}
    flags = [info.get("flags", {}) for info in infos]
    if views > 1 and not all(each.get("flip") and each.get("shift") for each in flags):
        cautions.append("not trained on mirrored and moved images: such views may harm it")
    result["caution"] = "; ".join(dict.fromkeys(cautions)) or None
    files = [(cli.shown(path), checkpoint.file_sha256(path)) for path, _, _ in (loaded[place] for place in members)]
    if len(members) == 1:
        ((path, digest),) = files
        own = {"checkpoint": path, "checkpoint_sha256": digest, "model": infos[0]["model"], "training": training[0]}
    else:
        own = {
            "ensemble": [{"checkpoint": path, "checkpoint_sha256": digest} for path, digest in files],
            "model": "+".join(sorted({info["model"] for info in infos})),
        }
    return own | result


def name(result):
    """What a result is called where it is one of several."""
    own = result.get("checkpoint") or f"all {len(result['ensemble'])} together"
    return own if result["views"] == 1 else f"{own}, {result['views']} views"


def caution(info, split):
    """What keeps this split from being new to the checkpoint, as a sentence, or None."""
    if "flags" not in info:
        return "how it was trained is not known, nor whether these images played a part"
    if info["data"] != split.source:
        return f"trained on {info['data']}, measured on {split.source}"
    select = info["flags"].get("select")
    if split.name == "train" or (split.name == "val" and select in ("test", "last")):
        return "trained on these very images"
    if any(teacher["select"] == split.name for teacher in info["flags"].get("teachers", [])):
        return "a teacher's best epoch was chosen on these very images, which flatters it"
    if split.name == select:
        return "its best epoch was chosen on these very images, which flatters it"
    return None


def spread(results):
    """Mean and standard deviation (n - 1) of the accuracy over the checkpoints trained alike, by number of views."""
    groups = {}
    for result in results:
        if "ensemble" in result:
            continue
        flags = result["training"]["flags"] or {}
        key = (result["model"], flags.get("recipe", "published"), flags.get("select"), result["views"])
        groups.setdefault(key, []).append(result["accuracy"])
    return [
        {
            "model": model,
            "recipe": recipe,
            "select": select,
            "views": views,
            "n": len(values),
            "mean_accuracy": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)),
        }
        for (model, recipe, select, views), values in groups.items()
        if len(values) > 1
    ]


def print_one(result, bins):
    training = result["training"]
    told = [f"seed {training['seed']}, epoch {training['epoch']}"] if training["epoch"] else []
    low, high = result["accuracy_ci95"]
    print(f"\n{', '.join([result['checkpoint'] + ': ' + result['model'], *told])}")
    print(f"{result['split']} split of {result['data']}, n = {result['n']:,}")
    print(f"  accuracy                    {result['accuracy']:.2%}  (95% interval {low:.2%} to {high:.2%})")
    print(f"  log loss                    {result['log_loss']:.4f} nats")
    print(f"  expected calibration error  {result['ece']:.4f}  ({bins} bins)")
    if result["caution"]:
        print(f"  caution: {result['caution']}")
    print(f"\n{'class':<12} {'precision':>9} {'recall':>7} {'F1':>7} {'images':>7}")
    for name, row in result["per_class"].items():
        print(f"{name:<12} {row['precision']:>9.1%} {row['recall']:>7.1%} {row['f1']:>7.1%} {row['support']:>7,}")


def print_several(content):
    results = content["checkpoints"]
    width = max(len(name(result)) for result in results)
    kind = max(len("model"), *(len(result["model"]) for result in results))
    print(f"\n{results[0]['split']} split of {results[0]['data']}, n = {results[0]['n']:,}\n")
    print(f"    {'checkpoint':<{width}}  {'model':<{kind}}  accuracy    95% interval   log loss     ECE")
    for number, result in enumerate(results, 1):
        low, high = result["accuracy_ci95"]
        print(
            f"{number:>2}  {name(result):<{width}}  {result['model']:<{kind}}  {result['accuracy']:>8.2%}  "
            f"{low:.2%} to {high:.2%}  {result['log_loss']:>8.4f}  {result['ece']:.4f}"
        )
    for number, result in enumerate(results, 1):
        if result["caution"]:
            print(f"caution, {number}: {result['caution']}")
    for group in content["means"]:
        views = f"{group['views']} views, " if group["views"] > 1 else ""
        print(
            f"\n{group['model']}, recipe {group['recipe']}, selected on {group['select']}: {views}"
            f"mean {group['mean_accuracy']:.2%}, standard deviation {group['sd']:.2%}, n = {group['n']} checkpoints"
        )
    print("\nMcNemar's exact test: images that only one of the two gets right")
    for (a, b), pair in zip(combinations(range(1, len(results) + 1), 2), content["mcnemar"], strict=True):
        print(f"{a:>2} against {b:>2}: {pair['only_a']:>5,} to {pair['only_b']:>5,}   p = {pair['p_value']:.2g}")


if __name__ == "__main__":
    cli.run(main)
