"""Write the data of docs/course.md into course/: made by the rules below, none of it real.

python examples/course_data.py

houses.csv        1,200 houses; the price follows from the other columns, and 5% of chance
reviews.jsonl     4,000 reviews of restaurants, positive or negative
translation/      6,000 English sentences and their German translations, line by line
shapes/           32 × 32 images in colour of ten shapes, one folder per class, as for CIFAR-10
few/              four other shapes, twelve images of each to learn from
"""

import csv
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

FOLDER = Path("course")


def main() -> None:
    """All of it, the same every time."""
    FOLDER.mkdir(exist_ok=True)
    write_houses(random.Random(1))
    write_reviews(random.Random(2))
    write_translation(random.Random(3))
    write_shapes(random.Random(4))
    print(f"{FOLDER}/ holds houses.csv, reviews.jsonl, translation/, shapes/ and few/")


DISTRICTS = {"harbour": 1.25, "old town": 1.15, "station": 0.9, "hills": 1.05}  # × the price


def write_houses(draw: random.Random, count: int = 1200) -> None:
    """price = (40 + 3 area + 8 rooms - 0.6 age - 5 distance + 25 if there is a garden)
    × the district's factor × (1 ± 5%), in thousands.
    """
    with (FOLDER / "houses.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["area", "rooms", "age", "distance", "garden", "district", "price"])
        for _ in range(count):
            area = draw.randint(40, 220)
            rooms = max(1, round(area / 30 + draw.gauss(0, 0.7)))
            age = draw.randint(0, 90)
            distance = round(draw.uniform(0.5, 25), 1)
            garden = draw.random() < 0.4
            district = draw.choice(list(DISTRICTS))
            value = 40 + 3 * area + 8 * rooms - 0.6 * age - 5 * distance + 25 * garden
            price = round(value * DISTRICTS[district] * draw.gauss(1, 0.05), 1)
            words = [str(garden).lower(), district, price]
            table.writerow([area, rooms, age, distance, *words])


SUBJECTS = ["food", "soup", "service", "wine", "music", "waiter", "dessert", "view"]
GOOD = ["good", "lovely", "fresh", "warm", "quick", "perfect"]
BAD = ["bad", "cold", "slow", "dull", "stale", "awful"]
DEGREES = {"": 1, "very ": 2, "rather ": 1, "really ": 2}


def write_reviews(draw: random.Random, count: int = 4000) -> None:
    """Two to five clauses. Each is worth 1, or 2 with `very` and `really`; `not` turns it round,
    and what comes after `but` counts twice. The sum decides; one whose sum is 0 is left out.
    """
    reviews: dict[str, str] = {}
    while len(reviews) < count:
        clauses = []
        total = 0
        for place in range(draw.randint(2, 5)):
            is_good = draw.random() < 0.5
            is_negated = draw.random() < 0.3
            degree = draw.choice(list(DEGREES))
            after_but = place > 0 and draw.random() < 0.25
            adjective = draw.choice(GOOD if is_good else BAD)
            worth = DEGREES[degree] * (2 if after_but else 1)
            total += worth if is_good != is_negated else -worth
            joint = "" if place == 0 else " but" if after_but else ","
            negation = "not " if is_negated else ""
            clauses.append(f"{joint} the {draw.choice(SUBJECTS)} was {negation}{degree}{adjective}")
        if total != 0:
            reviews["".join(clauses).strip()] = "positive" if total > 0 else "negative"
    with (FOLDER / "reviews.jsonl").open("w") as file:
        for text, label in reviews.items():
            file.write(json.dumps({"text": text, "label": label}) + "\n")


class Noun(NamedTuple):
    """A noun in both languages, and its gender in German."""

    english: str
    german: str
    gender: str  # m, f, n


NOUNS = [
    Noun("dog", "Hund", "m"),
    Noun("cat", "Katze", "f"),
    Noun("horse", "Pferd", "n"),
    Noun("man", "Mann", "m"),
    Noun("woman", "Frau", "f"),
    Noun("child", "Kind", "n"),
    Noun("tree", "Baum", "m"),
    Noun("flower", "Blume", "f"),
    Noun("house", "Haus", "n"),
    Noun("table", "Tisch", "m"),
    Noun("lamp", "Lampe", "f"),
    Noun("book", "Buch", "n"),
]
ADJECTIVES = {
    "old": "alt",
    "young": "jung",
    "small": "klein",
    "big": "groß",
    "green": "grün",
    "red": "rot",
    "new": "neu",
    "quiet": "ruhig",
}
VERBS = {
    "sees": "sieht",
    "finds": "findet",
    "paints": "malt",
    "buys": "kauft",
    "knows": "kennt",
    "draws": "zeichnet",
    "likes": "mag",
    "needs": "braucht",
}
TIMES = {
    "today": "heute",
    "often": "oft",
    "now": "jetzt",
    "tomorrow": "morgen",
    "sometimes": "manchmal",
}
# Article and ending of the adjective by (definite, gender): who acts, and to whom it is done.
NOMINATIVE = {
    (True, "m"): ("der", "e"),
    (True, "f"): ("die", "e"),
    (True, "n"): ("das", "e"),
    (False, "m"): ("ein", "er"),
    (False, "f"): ("eine", "e"),
    (False, "n"): ("ein", "es"),
}
ACCUSATIVE = NOMINATIVE | {(True, "m"): ("den", "en"), (False, "m"): ("einen", "en")}


def write_translation(draw: random.Random, count: int = 6000, files: int = 2) -> None:
    """Who does what to whom, and when. In German articles and adjectives go by gender and case, and
    the verb stays second, so that a word of time in front turns the order round.
    """
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        subject, subject_german = _noun_phrase(draw, NOMINATIVE)
        other, other_german = _noun_phrase(draw, ACCUSATIVE)
        verb = draw.choice(list(VERBS))
        time = draw.choice(list(TIMES))
        if draw.random() < 0.5:
            english = f"{time} {subject} {verb} {other} ."
            german = f"{TIMES[time]} {VERBS[verb]} {subject_german} {other_german} ."
        else:
            english = f"{subject} {verb} {other} {time} ."
            german = f"{subject_german} {VERBS[verb]} {TIMES[time]} {other_german} ."
        pairs[english] = german
    folder = FOLDER / "translation"
    folder.mkdir(exist_ok=True)
    lines = list(pairs.items())
    for number in range(files):
        part = lines[number::files]
        (folder / f"part-{number}.en").write_text("".join(f"{one}\n" for one, _ in part))
        (folder / f"part-{number}.de").write_text("".join(f"{other}\n" for _, other in part))


def _noun_phrase(
    draw: random.Random, endings: dict[tuple[bool, str], tuple[str, str]]
) -> tuple[str, str]:
    """`the old dog` in both languages."""
    noun = draw.choice(NOUNS)
    adjective = draw.choice(list(ADJECTIVES))
    is_definite = draw.random() < 0.5
    article, ending = endings[is_definite, noun.gender]
    english_article = "the" if is_definite else "an" if adjective[0] in "aeiou" else "a"
    german = f"{article} {ADJECTIVES[adjective]}{ending} {noun.german}"
    return f"{english_article} {adjective} {noun.english}", german


SIZE = 32  # pixels
CORNERS = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}


def write_shapes(draw: random.Random) -> None:
    """Shapes of any colour, size and place, on noise."""
    ten = [*CORNERS, "circle", "ring", "cross", "bar", "half", "star"]
    _write_images(draw, "shapes/train", ten, 150)
    _write_images(draw, "shapes/test", ten, 30)
    four = ["frame", "arrow", "dots", "crescent"]
    _write_images(draw, "few/train", four, 12)
    _write_images(draw, "few/test", four, 50)


def _write_images(draw: random.Random, part: str, names: list[str], count: int) -> None:
    for name in names:
        folder = FOLDER / part / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            _shape(name, draw).save(folder / f"{number:03}.png")


def _shape(name: str, draw: random.Random) -> Image.Image:
    base = [draw.randrange(256) for _ in range(3)]
    noise = [
        [max(0, min(255, value + draw.randint(-40, 40))) for value in base] for _ in range(SIZE**2)
    ]
    image = Image.new("RGB", (SIZE, SIZE))
    image.putdata([tuple(pixel) for pixel in noise])
    colour = tuple((value + draw.randint(90, 165)) % 256 for value in base)
    pencil = ImageDraw.Draw(image)
    radius = draw.uniform(8, 12)
    x, y = (draw.uniform(radius + 1, SIZE - radius - 1) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    turn = draw.uniform(0, 360)
    if name in CORNERS:
        pencil.regular_polygon((x, y, radius), CORNERS[name], round(turn), fill=colour)
    elif name == "circle":
        pencil.ellipse(box, fill=colour)
    elif name == "ring":
        pencil.ellipse(box, outline=colour, width=3)
    elif name == "half":
        pencil.chord(box, turn, turn + 180, fill=colour)
    elif name == "frame":
        pencil.regular_polygon((x, y, radius), 4, round(turn), outline=colour, width=3)
    elif name == "arrow":
        pencil.polygon(_corners(x, y, radius, turn, inner=0.2)[:4], fill=colour)
    elif name == "dots":
        pencil.ellipse((x - radius, y - 4, x - radius + 8, y + 4), fill=colour)
        pencil.ellipse((x + radius - 8, y - 4, x + radius, y + 4), fill=colour)
    elif name == "crescent":
        pencil.arc(box, turn, turn + 200, fill=colour, width=5)
    elif name == "star":
        pencil.polygon(_corners(x, y, radius, turn, inner=0.45), fill=colour)
    else:
        for angle in (turn,) if name == "bar" else (turn, turn + 90):
            step = (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)))
            ends = [(x - step[0], y - step[1]), (x + step[0], y + step[1])]
            pencil.line(ends, fill=colour, width=4)
    return image


def _corners(
    x: float, y: float, radius: float, turn: float, inner: float
) -> list[tuple[float, float]]:
    """Of a star with five points."""
    corners = []
    for number in range(10):
        angle = math.radians(turn + 36 * number)
        length = radius * (inner if number % 2 else 1)
        corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return corners


if __name__ == "__main__":
    main()
