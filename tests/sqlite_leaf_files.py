"""FedJAX's SQLite files and LEAF's JSON files, written from their published layouts; shares no code with the readers.

SQLite: fedjax/core/sqlite_federated_data.py (SQLiteFederatedDataBuilder) and serialization.py of google/fedjax.
JSON: the scripts in data/ of TalwalkarLab/leaf: utils/split_data.py, shakespeare/preprocess/shake_utils.py,
sent140/preprocess/data_to_json.py, celeba/preprocess/metadata_to_json.py, reddit/source/preprocess.py.
"""

import json
import re
import sqlite3
import zlib

import msgpack
import numpy as np

# ---- FedJAX


def fedjax_blob(features):
    """A client's features as stored: zlib of msgpack; lists of bytes are arrays of objects."""
    packed = {name: _fedjax_array(values) for name, values in features.items()}
    return zlib.compress(msgpack.packb(packed, strict_types=True))


def _fedjax_array(values):
    if isinstance(values, list):
        return msgpack.ExtType(4, msgpack.packb(((len(values),), values), use_bin_type=True))
    parts = (values.shape, values.dtype.name, values.tobytes("C"))
    return msgpack.ExtType(1, msgpack.packb(parts, use_bin_type=True))


def write_fedjax(path, clients, num_examples=None):
    """Write (id, features or a blob) of each client, in the order given; ids are bytes, or text as in CIFAR-100."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")  # the disk need not have it: faster
    connection.execute(
        "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, data BLOB NOT NULL, "
        "num_examples INTEGER NOT NULL);"
    )
    for client, features in clients:
        blob = features if isinstance(features, bytes) else fedjax_blob(features)
        count = num_examples if num_examples is not None else len(next(iter(features.values())))
        connection.execute("INSERT INTO federated_data VALUES (?, ?, ?);", (client, blob, count))
    connection.commit()
    connection.close()
    return path


# ---- LEAF


def leaf_json(samples, **replaced):
    """The object of a file: `samples` maps users to (x, y); replaced: users, num_samples, or others."""
    whole = {
        "users": list(samples),
        "num_samples": [len(y) for _, y in samples.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in samples.items()},
    }
    return whole | replaced


def write_leaf(path, samples, **replaced):
    """Write such a file as LEAF does, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(leaf_json(samples, **replaced)))
    return path


def split_by_sample(samples, cut):
    """What split_data.py --by_sample makes of all samples: users of one sample leave nothing but an empty entry."""
    users = [user for user, (_, y) in samples.items() if len(y) >= 2]
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        kept = {user: (x[rows], y[rows]) if user in users else ([], []) for user, (x, y) in samples.items()}
        counts = [len(kept[user][1]) for user in users]
        parts.append((kept, {"users": users, "num_samples": counts, "hierarchies": ["group"] * len(samples)}))
    return parts


def shakespeare_windows(lines, length=80):
    """(x, y) of a role's lines, each with its line end: windows of each line after `length` spaces."""
    x, y = [], []
    for line in lines:
        padded = " " * length + re.sub(r"   *", r" ", line)
        for start in range(len(padded) - length):
            x.append(padded[start : start + length])
            y.append(padded[start + length])
    return x, y


def reddit_rows(comments, length=10):
    """(x, y) of a user's comments: tokens and next tokens, padded and cut into rows of `length`."""

    def rows(tokens, pad):
        tokens = tokens + [pad] * (-len(tokens) % length)
        return [tokens[start : start + length] for start in range(0, len(tokens), length)]

    x, y = [], []
    for number, words in enumerate(map(str.split, comments)):
        x.append(rows(["<BOS>", *words, "<EOS>"], "<PAD>"))
        targets = rows([*words, "<EOS>", "<PAD>"], "<PAD>")
        counted = rows([1.0] * (len(words) + 2), 0.0)
        y.append({"subreddit": "r", "created_utc": number, "target_tokens": targets, "count_tokens": counted})
    return x, y


def tweet(text, user="someone"):
    """The fields of a tweet in LEAF's Sentiment140."""
    return ["2087", "Sat May 16 23:58:44 UTC 2009", "NO_QUERY", user, text, "training"]


def femnist_images(images):
    """Images (n, 28, 28) uint8 as LEAF's lists of 784 numbers from 0 to 1, row by row."""
    return (np.asarray(images).reshape(-1, 784) / 255).tolist()
