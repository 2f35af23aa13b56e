"""The metrics as plain loops over one row or all rows, written from their formulas alone; None where one is undefined.

An item is its number, `title[item]` what it is called, `luck[item]` what decides ties. -1: no item, -2: no answer.
"""

import math


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def place(ranked, target, title):
    for number, item in enumerate(ranked, start=1):
        if item >= 0 and title[item] == title[target]:
            return number
    return math.inf


def cosine(a, b):
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b)) / size if size else 0.0


def most_popular(count, luck, groups=5):
    """Items of the last of `groups` equal bins by count."""
    order = sorted(range(len(count)), key=lambda i: (count[i], luck[i]))
    return {item for number, item in enumerate(order) if number * groups // len(order) == groups - 1}


def neighbours(history, title, vector, luck, k):
    seen = {title[h] for h in history if h >= 0}
    near = {
        i: max(cosine(vector[i], vector[h]) for h in history if h >= 0)
        for i in range(len(title))
        if seen and title[i] not in seen
    }
    return sorted(near, key=lambda i: (-near[i], luck[i]))[:k]


def by_row(ranked, target, history, candidates, *, title, count, vector, luck, k, bound):
    """The metrics of one row by their names in `results.json`."""
    rank, top = place(ranked, target, title), ranked[:5]
    items, answers = [i for i in top if i >= 0], [i for i in top if i >= -1]
    seen = {title[h] for h in history if h >= 0}
    listed = {title[c] for c in candidates}
    found = {"MRR": 0.0 if rank == math.inf else 1 / rank}
    for cut in (1, 5, 10):
        if cut <= len(ranked):
            found[f"HR@{cut}"] = float(rank <= cut)
            if cut > 1:
                found[f"NDCG@{cut}"] = 1 / math.log2(rank + 1) if rank <= cut else 0.0
    first = ranked[0]
    ok = first >= 0 and (not bound or title[first] in listed)
    found["valid_ratio"] = float(ok)
    found["HR@1_of_valid"] = found["HR@1"] if ok else None
    found["HR@1_cold"] = found["HR@1"] if count[target] == 0 else None
    lift = mean(math.log(1 + count[i]) for i in items)
    found["popularity_lift"] = None if lift is None else lift - math.log(1 + count[target])
    found["ARP"] = mean(count[i] for i in items)
    found["APLT"] = mean(i not in most_popular(count, luck) for i in items)
    found["novelty"] = mean(-math.log2(max(count[i], 1) / max(sum(count), 1)) for i in items)
    found["not_in_catalogue"] = mean(i == -1 for i in answers)
    found["history_copy"] = mean(i >= 0 and title[i] in seen for i in answers)
    found["duplicate"] = mean(
        i >= 0 and title[i] in [title[j] for j in answers[:number] if j >= 0] for number, i in enumerate(answers)
    )
    distinct = [i for number, i in enumerate(items) if title[i] not in [title[j] for j in items[:number]]]
    found["diversity"] = mean(
        1 - cosine(vector[a], vector[b]) for number, a in enumerate(distinct) for b in distinct[:number]
    )
    near = {title[i] for i in neighbours(history, title, vector, luck, k)} - {title[target]}
    found["semantic_error_rate"] = None if first == -2 else float(first >= 0 and title[first] in near)
    pool = candidates if bound else [i for i in range(len(title)) if title[i] not in seen]
    found["semantic_error_rate_random"] = mean(title[i] in near for i in pool)
    return found


def gini(counts):
    """Half the mean absolute difference over the mean."""
    n, total = len(counts), sum(counts)
    return sum(abs(a - b) for a in counts for b in counts) / (2 * n * total) if total else 0.0


def unfairness(histories, lists, groups, names):
    """(MGU, DGU) over `names`; None when no item that has a group stands in the histories or in the lists."""

    def shares(rows):
        labels = [name for row in rows for item in row if item >= 0 for name in groups[item]]
        return [labels.count(name) / len(labels) for name in names] if labels else None

    theirs, ours = shares(histories), shares(lists)
    if theirs is None or ours is None:
        return None, None
    gaps = [a - b for a, b in zip(ours, theirs)]
    return sum(map(abs, gaps)) / len(gaps), max(gaps) - min(gaps)


def confidence(scores, items, title):
    best = {title[item]: score for item, score in reversed(list(zip(items, scores)))}
    return max(map(math.exp, best.values())) / sum(map(math.exp, best.values()))


def calibration(probabilities, outcomes, bins=10):
    gap = 0.0
    for b in range(bins):
        here = [
            (p, o)
            for p, o in zip(probabilities, outcomes)
            if b / bins <= p < (b + 1) / bins or (p == 1 and b == bins - 1)
        ]
        if here:
            gap += len(here) / len(probabilities) * abs(mean(o for _, o in here) - mean(p for p, _ in here))
    return gap
