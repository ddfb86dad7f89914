"""OpenAI's ViT-B/32 trained further on image-text pairs, both towers, with the softmax loss over the global batch.

    python scripts/train.py --config=configs/pairs.py --workdir=runs/pairs \
        --config.data.train="webdataset:cc3m/{00000..00331}.tar::csv:own/captions.csv?weight=0.1" \
        --config.data.val=folder:photos/val --config.data.retrieval="webdataset:flickr30k/test/*.tar"

Hardware: meant for one GPU of 80 GB or a TPU v5e-8; not measured. Expected result: not measured.

The shards may be on gs:// or s3://. The labelled images of `data.val` are classified zero-shot during the training and
choose the checkpoint to keep; `data.retrieval` gives the recall at its end.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"train": "webdataset:pairs/train/*.tar", "val": "folder:photos/val", "num_workers": 4},
            "model": {"name": "openai/clip-vit-base-patch32", "compute_dtype": "bfloat16"},
            "method": {"loss": "softmax"},
            "train": {"num_steps": 10_000, "global_batch_size": 1024},
            "eval": {"batch_size": 256},
        }
    )
