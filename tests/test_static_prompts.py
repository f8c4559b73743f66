"""The prompt file for the real teacher: enough prompts, varied, for still pictures, free of what they must not ask."""

import re
from pathlib import Path

import numpy as np
import pytest

PROMPT_FILE = Path(__file__).parent.parent / "data" / "static_prompts.txt"

# Jaccard index of two prompts' word sets. Short prompts share articles and prepositions by chance; two that agree
# beyond this say the same thing.
MAX_OVERLAP = 0.6
MAX_SHARED_START = 4  # prompts that may begin with the same three words

FORBIDDEN = {
    "lettering": r"text|word|words|letter|letters|lettering|caption|captioned|captions|logo|logos|numerals|slogan|"
    r"signage|signpost|subtitle|subtitles|typography|calligraphy|watermark|headline|newspaper|inscription",
    "video": r"video|videos|footage|timelapse|time-lapse|hyperlapse|panning|zooming|zooms|camera moves?|"
    r"slow motion|tracking shot|dolly shot|animated|animation|gif|clip|frames per second|fps",
    "brand or protected name": r"coca|pepsi|nike|adidas|lego|ferrari|porsche|tesla|toyota|vespa|volkswagen|iphone|"
    r"polaroid|leica|nikon|canon|kodak|hasselblad|disney|pixar|ghibli|marvel|pokemon|pikachu|nintendo|mario|"
    r"star wars|hogwarts|barbie|playmobil|starbucks|rolex",
    "artist": r"monet|picasso|gogh|rembrandt|vermeer|dali|hokusai|warhol|banksy|klimt|hopper|turner|artstation",
}


@pytest.fixture(scope="module")
def prompts():
    # Decoded strictly and split at \n only: any other line break within a prompt must show up as a failure below.
    lines = PROMPT_FILE.read_bytes().decode("utf-8").split("\n")
    assert lines[-1] == "", "the last line does not end in a newline"
    return lines[:-1]


def overlaps(prompts):
    """Jaccard index of the word sets of every pair, (N, N), zero on and below the diagonal."""
    word_sets = [set(re.findall(r"\w+", prompt.casefold())) for prompt in prompts]
    column = {word: i for i, word in enumerate(sorted(set.union(*word_sets)))}
    has_word = np.zeros((len(prompts), len(column)), dtype=np.float32)
    for row, words in enumerate(word_sets):
        has_word[row, [column[word] for word in words]] = 1
    shared = has_word @ has_word.T  # (N, N)
    sizes = has_word.sum(axis=1)
    return np.triu(shared / (sizes[:, None] + sizes[None, :] - shared), k=1)


def test_enough_prompts(prompts):
    assert len(prompts) >= 1000


def test_lines_are_clean(prompts):
    unclean = [p for p in prompts if p != " ".join(p.split()) or not p or not p.isprintable() or p.startswith("\ufeff")]
    assert unclean == []


def test_no_duplicates(prompts):
    folded = [prompt.casefold() for prompt in prompts]
    assert len(set(folded)) == len(folded), sorted({p for p in folded if folded.count(p) > 1})


def test_overlap_is_the_jaccard_index():
    found = overlaps(["a red cup", "A red, red book!", "blue sky"])
    np.testing.assert_allclose(found, [[0, 0.5, 0], [0, 0, 0], [0, 0, 0]])


def test_no_near_duplicates(prompts):
    pairs = np.argwhere(overlaps(prompts) >= MAX_OVERLAP)
    assert [(prompts[i], prompts[j]) for i, j in pairs] == []


def test_prompts_do_not_follow_one_template(prompts):
    starts = [tuple(re.findall(r"\w+", prompt.casefold())[:3]) for prompt in prompts]
    assert {start for start in starts if starts.count(start) > MAX_SHARED_START} == set()


def test_lengths_are_mixed(prompts):
    lengths = np.array([len(prompt.split()) for prompt in prompts])
    assert lengths.min() >= 4 and lengths.max() <= 60
    assert 0.2 <= np.mean(lengths <= 8) <= 0.35, "short"
    assert 0.2 <= np.mean(lengths >= 30) <= 0.35, "long"
    assert np.sum(lengths >= 45) >= 10, "very long"


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden_words(prompts, what):
    pattern = re.compile(rf"\b(?:{FORBIDDEN[what]})\b", re.IGNORECASE)
    assert [prompt for prompt in prompts if pattern.search(prompt)] == []


TOPICS = {  # pattern, prompts that must match it at least
    "counting": (r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve", 100),
    "relations": (r"left|right|above|below|beneath|behind|between|beside|under", 200),
    "colours": (r"red|green|blue|yellow|orange|violet|purple|pink|black|white|grey", 400),
    "photography": (
        r"photo\w*|lens|macro|telephoto|close-up|wide-angle|long exposure|shallow (?:depth|focus)|overhead shot|"
        r"low-angle|backlit|bokeh|monochrome|tilt-shift|shutter|flash",
        120,
    ),
    "other media": (
        r"oils?|watercolour|gouache|ink|pixel art|render|clay|paper-cut|linocut|woodcut|pencil|charcoal|pastel|"
        r"stained glass|mosaic|embroider\w+|isometric|illustration|painting|drawing|sketch|etching|poster|collage",
        200,
    ),
}


@pytest.mark.parametrize("topic", TOPICS)
def test_topics_are_covered(prompts, topic):
    pattern, at_least = TOPICS[topic]
    matching = [p for p in prompts if re.search(rf"\b(?:{pattern})\b", p, re.IGNORECASE)]
    assert len(matching) >= at_least
