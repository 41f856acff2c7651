"""A small RADIO end to end on real photographs: images, distillation from three teachers, evaluation, export, pictures.

The photographs are those that scikit-image and scikit-learn ship; the scenes are drawn, and their labels known. Each step is a command that
can be typed by hand; this script prints it and runs it. Run again, the distillation continues from its last checkpoint.

    python examples/radio/demo.py [KEY=VALUE ...]     options for the distillation, such as student.hidden_size=64
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path("examples/radio/photographs.yaml")
RUN = Path("runs/radio")
HELD_OUT = ("astronaut", "coffee", "china", "grass")
NUM_SCENES = {"scenes": 192, "scenes_held_out": 96}
SCENE_SIDE = 256


def main() -> int:
    """Run every step; returns the exit code of the first that fails."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    make_images(ROOT / RUN / "images")
    student, exported = str(RUN / "student"), str(RUN / "exported")
    steps = [
        ["train", str(CONFIG), *sys.argv[1:]],
        ["evaluate", student],
        ["export", student, exported],
    ]
    for step in steps:
        code = run(*step)
        if code:
            return code
    print("\n" + describe_results(student))
    return 0


def describe_results(student: str) -> str:
    """Where the pictures lie."""
    return "\n".join(
        [
            f"run directory           {student}",
            f"losses                  {student}/loss.png",
            f"features (PCA)          {student}/features.png",
            f"curves over resolution  {student}/evaluation.png (a mode switch shows as a step)",
        ]
    )


def make_images(folder: Path) -> None:
    """Write the photographs and the scenes as shards, unless they are there."""
    sys.path.insert(0, str(ROOT))
    from vision_agglom.images.pack import encode_jpeg, encode_png, write_shards
    from vision_agglom.images.photographs import load_photographs
    from vision_agglom.images.records import Record
    from vision_agglom.images.scenes import draw_scene

    if not (folder / "photographs").exists():
        photographs = load_photographs()
        for name, kept in (("photographs", lambda title: title not in HELD_OUT), ("held_out", lambda title: title in HELD_OUT)):
            records = [Record(f"{title}.jpg", encode_jpeg(image)) for title, image in photographs.items() if kept(title)]
            write_shards(records, folder / name / "images", samples_per_shard=64)
            print(f"{folder / name}: {len(records)} photographs", flush=True)
    for seed, (name, count) in enumerate(NUM_SCENES.items()):
        if not (folder / name).exists():
            scenes = (draw_scene(index, side=SCENE_SIDE, seed=seed) for index in range(count))
            records = (
                Record(f"{index}.jpg", encode_jpeg(scene.image), scene.class_index, encode_png(scene.mask))
                for index, scene in enumerate(scenes)
            )
            write_shards(records, folder / name / "images", samples_per_shard=256)
            print(f"{folder / name}: {count} scenes", flush=True)


def run(*arguments: str) -> int:
    """Print a command and run it."""
    print(f"\n$ python -m vision_agglom {' '.join(map(shlex.quote, arguments))}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "vision_agglom", *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
