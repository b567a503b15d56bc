"""The basket: prompts written for this repository, scored before and after. No package has these functions.

Functions ask for what the fine-tuning teaches; general prompts (two languages) show what it may have cost.
"""

from sources import corpus

# Parsed like the corpus: the docstring is the reference, the rest is the prompt.
FUNCTIONS = '''
def celsius_to_fahrenheit(degrees):
    """Convert a temperature from Celsius to Fahrenheit."""
    return degrees * 9 / 5 + 32

def count_vowels(word):
    """Count the vowels in a word."""
    return sum(letter in 'aeiou' for letter in word.lower())

def moving_average(values, window):
    """Compute the moving average of a sequence with a given window."""
    total = sum(values[:window])
    averages = [total / window]
    for old, new in zip(values, values[window:]):
        total += new - old
        averages.append(total / window)
    return averages

def is_leap_year(year):
    """Return True if the year is a leap year."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)

def flatten(nested):
    """Yield the items of a nested list in order."""
    for item in nested:
        if isinstance(item, list):
            yield from flatten(item)
        else:
            yield item

def transpose(matrix):
    """Return the transpose of a matrix given as a list of rows."""
    return [list(column) for column in zip(*matrix)]

def read_config(path, default=None):
    """Read a JSON configuration file, or return the default if it does not exist."""
    if not os.path.exists(path):
        return default or {}
    with open(path) as stream:
        return json.load(stream)

def gcd(a, b):
    """Return the greatest common divisor of two integers."""
    while b:
        a, b = b, a % b
    return abs(a)

def shortest_path(graph, source, target):
    """Find a shortest path between two nodes of an unweighted graph by breadth-first search."""
    queue, parent = deque([source]), {source: None}
    while queue:
        node = queue.popleft()
        if node == target:
            path = []
            while node is not None:
                path.append(node)
                node = parent[node]
            return path[::-1]
        for neighbour in graph[node]:
            if neighbour not in parent:
                parent[neighbour] = node
                queue.append(neighbour)
    return None

def add_noise(signal, scale, rng):
    """Add Gaussian noise of a given scale to a signal."""
    return signal + rng.normal(0.0, scale, size=signal.shape)

def delete_user(session, user_id):
    """Delete a user from the database by id."""
    user = session.get(User, user_id)
    if user is None:
        raise KeyError(user_id)
    session.delete(user)
    session.commit()

def f1(precision, recall):
    """Compute the F1 score from precision and recall."""
    if precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)

def retry(function, attempts, delay):
    """Call a function until it succeeds or the attempts are used up."""
    for attempt in range(attempts):
        try:
            return function()
        except OSError:
            if attempt == attempts - 1:
                raise
            time.sleep(delay)

def plot_loss(history, path):
    """Plot the training loss and save the figure to a file."""
    figure, axes = plt.subplots()
    axes.plot(history)
    axes.set_xlabel('step')
    axes.set_ylabel('loss')
    figure.savefig(path)
    plt.close(figure)
'''
GENERAL = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three fruits.",
    "Explain in one sentence why the sky is blue.",
    "Translate to French: Good morning, my friend.",
    "If I have 3 apples and eat one, how many are left?",
    "Give me a short tip for sleeping better.",
]
RUSSIAN = [
    "Какой город является столицей России?",
    "Напиши одно предложение о зиме.",
    "Что такое нейронная сеть?",
]


def prompts(run) -> list[dict]:
    """All prompts in a fixed order, as rows {"id", "kind", "prompt", "completion", "taught"}.

    Only what the fine-tuning teaches has a reference as completion. With own data up to 14 of its dev rows
    stand in place of the functions.
    """
    if run.cfg.data == "corpus":
        functions = corpus.functions_in(FUNCTIONS, "basket")
        taught = [{"kind": "function", "prompt": f["code"], "completion": f["summary"]} for f in functions]
    else:
        dev = run.rows("dev")
        taught = [{**row, "kind": "own"} for row in dev[:14]]
    general = [("general", text) for text in GENERAL] + [("russian", text) for text in RUSSIAN]
    rows = [{**row, "taught": True} for row in taught]
    rows += [{"kind": kind, "prompt": text, "completion": "", "taught": False} for kind, text in general]
    return [{**row, "id": number} for number, row in enumerate(rows)]
