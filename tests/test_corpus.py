"""The corpus: what is kept, what counts as a duplicate or a leak."""

from sources import corpus

SOURCE = '''
def area(radius):
    """Return the area of a circle.

    More text.
    """
    # a comment
    return 3.14159 * radius ** 2

class Shape:
    def scale(self, factor):
        """Scale the shape by a factor."""
        self.size *= factor

    def __repr__(self):
        """Represent the shape as text."""
        return "Shape"

def short(x):
    """Too short."""
    return x

def stub(x):
    """Do nothing at all here."""

def foreign(x):
    """Посчитать площадь круга по радиусу."""
    return x
'''


def test_only_documented_real_functions_are_kept_without_their_docstring():
    rows = corpus.functions_in(SOURCE, "shapes")
    assert [r["qualname"] for r in rows] == ["area", "Shape.scale"]
    assert [r["summary"] for r in rows] == ["Return the area of a circle.", "Scale the shape by a factor."]
    assert rows[0]["code"] == "def area(radius):\n    return 3.14159 * radius ** 2"


def test_near_duplicates_point_at_the_earlier_kept_one():
    lines = "\n".join(f"    total_{i} = sum(n * {i} for n in items if n > {i})" for i in range(20))
    loop, renamed = f"def f(items):\n{lines}", f"def g(items):\n{lines.replace('total_7', 'result_7')}"
    other = "def h(path):\n    with open(path) as stream:\n        return stream.read().splitlines()"
    assert corpus.near_duplicates([loop, other, renamed]) == [None, None, 0]


def test_planted_leaks_are_counted():
    train = [{"summary": "Return the mean of a list.",
              "code": "def mean(values):\n    return sum(values) / len(values)"}]
    loop = "def average(xs):\n    s = 0\n    for x in xs:\n        s += x\n    return s / len(xs)"
    held_out = [{"summary": "return the MEAN of a list", "code": loop},
                {"summary": "Average some numbers.", "code": train[0]["code"].replace("mean", "average")}]
    assert corpus.leaks(train, held_out) == {"same_summary": 1, "same_body": 1, "near_duplicate": 1}


def test_deduplicate_keeps_the_first_and_drops_a_summary_that_the_code_repeats():
    row = {"summary": "Return the mean of values.", "code": "def f(v):\n    return sum(v) / len(v)"}
    leaked = {"summary": "Read the whole file now.",
              "code": "def g(p):\n    raise OSError('read the whole file now')"}
    kept, counts = corpus.deduplicate([row, {**row, "summary": "return the mean of values"}, leaked])
    assert kept == [row]
    assert counts == {"parsed": 3, "same_summary": 1, "same_body": 0, "near_duplicate": 0,
                      "summary_in_code": 1, "kept": 1}
