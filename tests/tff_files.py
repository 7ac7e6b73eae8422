"""Small files in the published layout of TFF's datasets, /examples/<client id>/<feature>, by plain h5py.

Shares no code with the readers of data_prep. Each function writes {client: ...} and returns the path.
"""

import h5py
import numpy as np


def write(path, clients):
    """Write {client: {feature: array}}; a list of bytes becomes fixed or variable text, as the files have both."""
    with h5py.File(path, "w") as file:
        examples = file.create_group("examples")
        for client, features in clients.items():
            group = examples.create_group(client)
            for name, rows in features.items():
                if isinstance(rows, np.ndarray):
                    group.create_dataset(name, data=rows)
                elif len(rows) % 2 or not any(rows):
                    group.create_dataset(name, (len(rows),), h5py.special_dtype(vlen=bytes), rows)
                else:
                    group.create_dataset(name, data=np.array(rows, "S"), compression="gzip")
    return path


def shakespeare(folder, train, test):
    """{role: [snippet as bytes]} for both splits."""
    for split, roles in (("train", train), ("test", test)):
        write(folder / f"shakespeare_{split}.h5", {role: {"snippets": texts} for role, texts in roles.items()})
    return folder


def emnist(folder, train, test, stem="fed_emnist"):
    """{writer: (gray levels 0..255 (n, 28, 28), labels)}: pixels are float32 level / 255, 1.0 is white."""
    for split, writers in (("train", train), ("test", test)):
        clients = {
            writer: {
                "label": np.asarray(labels, np.int32),
                "pixels": (np.asarray(levels, np.float64) / 255).astype(np.float32),
            }
            for writer, (levels, labels) in writers.items()
        }
        write(folder / f"{stem}_{split}.h5", clients)
    return folder


def cifar100(folder, train, test):
    """{client: (images (n, 32, 32, 3), fine labels)}."""
    for split, parts in (("train", train), ("test", test)):
        clients = {
            client: {
                "coarse_label": np.zeros(len(labels), np.int64),
                "image": np.asarray(images, np.uint8),
                "label": np.asarray(labels, np.int64),
            }
            for client, (images, labels) in parts.items()
        }
        write(folder / f"fed_cifar100_{split}.h5", clients)
    return folder


def stackoverflow(folder, **splits):
    """{user: [(sentence as bytes, type as bytes)]} for train, held_out and test."""
    for split, users in splits.items():
        clients = {
            user: {
                "creation_date": [b"2017-05-01 10:00:00.25 UTC"] * len(posts),
                "score": np.zeros(len(posts), np.int64),
                "tags": [b"python|mpi"] * len(posts),
                "title": [b"how to sum over ranks"] * len(posts),
                "tokens": [sentence for sentence, _ in posts],
                "type": [kind for _, kind in posts],
            }
            for user, posts in users.items()
        }
        write(folder / f"stackoverflow_{split}.h5", clients)
    return folder
