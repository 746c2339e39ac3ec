"""Labelled texts of the four demo tenants, read out of ordinary PyPI packages (extra ``train``).

Every loader returns ``(train, held_out)`` lists of ``(text, label)``. The split follows the natural
unit (sentence template, question), so that a held-out row was never seen in training in another guise.
Sources: home-assistant-intents (Apache-2.0), chatterbot-corpus (BSD), bastioncorpus (MIT).
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path

import yaml

from examples.intent_templates import TemplateSampler

Rows = list[tuple[str, str]]
Split = tuple[Rows, Rows]

SMART_HOME_LABELS: dict[str, tuple[str, ...]] = {
    "climate": ("HassClimateGetTemperature", "HassClimateSetFanMode", "HassClimateSetTemperature", "HassFanSetSpeed"),
    "light": ("HassLightSet",),
    "list": (
        "HassListAddItem",
        "HassListCompleteItem",
        "HassListRemoveItem",
        "HassShoppingListAddItem",
        "HassShoppingListCompleteItem",
    ),
    "media": (
        "HassMediaNext",
        "HassMediaPause",
        "HassMediaPlayerMute",
        "HassMediaPlayerUnmute",
        "HassMediaPrevious",
        "HassMediaSearchAndPlay",
        "HassMediaUnpause",
        "HassSetVolume",
        "HassSetVolumeRelative",
    ),
    "robot": ("HassVacuumCleanArea", "HassVacuumReturnToBase", "HassVacuumStart", "HassLawnMowerDock"),
    "status": ("HassGetState",),
    "timer": (
        "HassStartTimer",
        "HassIncreaseTimer",
        "HassDecreaseTimer",
        "HassCancelTimer",
        "HassCancelAllTimers",
        "HassPauseTimer",
        "HassUnpauseTimer",
        "HassTimerStatus",
    ),
    "turn_off": ("HassTurnOff",),
    "turn_on": ("HassTurnOn",),
    "weather_time": ("HassGetWeather", "HassGetCurrentDate", "HassGetCurrentTime"),
}
HELPDESK_TOPICS: dict[str, tuple[str, ...]] = {
    "arts": ("literature", "movies"),
    "chitchat": ("greetings", "conversations", "gossip", "humor", "botprofile"),
    "feelings": ("emotion", "psychology"),
    "knowledge": ("science", "computers", "ai", "money", "history"),
    "programming": ("coding",),
    "quiz": ("trivia",),
}
LANGUAGES = (
    "dutch",
    "english",
    "french",
    "german",
    "indonesian",
    "italian",
    "portuguese",
    "spanish",
    "swedish",
    "turkish",
)


def smart_home(train_per_label: int = 90, held_out_per_label: int = 30) -> Split:
    """Voice commands by intent group; a quarter of each group's templates is held out."""
    rng = random.Random(0)
    document = json.loads((package_folder("home_assistant_intents") / "data" / "en.json").read_text())
    sampler = TemplateSampler(document, rng)
    train: Rows = []
    held_out: Rows = []
    for label, intents in SMART_HOME_LABELS.items():
        templates = [t for name in intents for block in document["intents"][name]["data"] for t in block["sentences"]]
        rng.shuffle(templates)
        cut = max(1, len(templates) // 4)
        train += _sample(sampler, templates[cut:], label, train_per_label)
        held_out += _sample(sampler, templates[:cut], label, held_out_per_label)
    return train, _unseen(held_out, train)


def helpdesk(cap: int = 220) -> Split:
    """Questions by topic."""
    train: Rows = []
    held_out: Rows = []
    for label, topics in HELPDESK_TOPICS.items():
        conversations = [c for topic in topics for c in _conversations("english", topic)]
        questions = [c[0] for c in conversations]
        if len(set(questions)) < 120:
            questions = [turn for c in conversations for turn in c]
        train_part, held_out_part = _split(questions, label, held_out_fraction=0.25, cap=cap)
        train += train_part
        held_out += held_out_part
    return train, _unseen(held_out, train)


def language(cap: int = 160) -> Split:
    """Utterances of at least three words by language."""
    train: Rows = []
    held_out: Rows = []
    for label in LANGUAGES:
        folder = package_folder("chatterbot_corpus") / "data" / label
        topics = sorted(f.stem for f in folder.glob("*.yml") if f.stem not in {"coding", "tech_support"})
        turns = [turn for topic in topics for c in _conversations(label, topic) for turn in c if len(turn.split()) >= 3]
        train_part, held_out_part = _split(turns, label, held_out_fraction=0.25, cap=cap)
        train += train_part
        held_out += held_out_part
    return train, _unseen(held_out, train)


def guardrail() -> Split:
    """Prompt injections versus harmless texts."""
    lines = (package_folder("bastioncorpus") / "corpus" / "injections.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    malicious = [e["text"] for e in entries if e["label"] != "benign"]
    harmless = [e["text"] for e in entries if e["label"] == "benign"]
    for topic in ("tech_support", "coding", "trivia"):
        harmless += [c[0] for c in _conversations("english", topic)[:40]]
    harmless_train, harmless_held_out = _split(harmless, "harmless", held_out_fraction=0.3)
    malicious_train, malicious_held_out = _split(malicious, "injection", held_out_fraction=0.3)
    return harmless_train + malicious_train, harmless_held_out + malicious_held_out


TENANTS: dict[str, Callable[[], Split]] = {
    "smart-home": smart_home,
    "helpdesk": helpdesk,
    "language": language,
    "guardrail": guardrail,
}


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing (and so without running) it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {name!r} is missing: pip install -c constraints.txt -e '.[train]'")
    return Path(next(iter(spec.submodule_search_locations)))


def _conversations(language_name: str, topic: str) -> list[list[str]]:
    path = package_folder("chatterbot_corpus") / "data" / language_name / f"{topic}.yml"
    document = yaml.safe_load(path.read_text())
    return [[str(turn).strip() for turn in c] for c in document["conversations"] if c]


def _sample(sampler: TemplateSampler, templates: list[str], label: str, count: int) -> Rows:
    texts: dict[str, None] = {}
    for attempt in range(count * 6):
        if len(texts) < count:
            texts[sampler.sample(templates[attempt % len(templates)])] = None
    return [(text, label) for text in texts if text]


def _split(texts: list[str], label: str, held_out_fraction: float, cap: int | None = None) -> Split:
    unique = sorted({text[:200] for text in texts if text})
    random.Random(0).shuffle(unique)
    unique = unique[:cap]
    cut = max(1, int(len(unique) * held_out_fraction))
    rows = [(text, label) for text in unique]
    return rows[cut:], rows[:cut]


def _unseen(held_out: Rows, train: Rows) -> Rows:
    seen = {text for text, _ in train}
    return [row for row in held_out if row[0] not in seen]
