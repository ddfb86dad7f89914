"""The tf.data side of `benchmarks.input_pipeline`, which decodes only the crop of a JPEG."""

import csv
import json
import os
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf

MEAN, STD = tf.constant([0.48145466, 0.4578275, 0.40821073]), tf.constant([0.26862954, 0.26130258, 0.27577711])


def main(files: str, workers: int, size_px: int, scale_min: float, batch_size: int) -> None:
    with open(files, newline="") as file:
        rows = list(csv.DictReader(file))
    ids = {label: i for i, label in enumerate(sorted({row["label"] for row in rows}))}

    def load(path: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros([1, 0, 4]),
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(scale_min, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, (size_px, size_px), "bicubic")
        image = tf.image.random_flip_left_right(image)
        return (image / 255 - MEAN) / STD, label

    dataset = tf.data.Dataset.from_tensor_slices(
        ([row["filename"] for row in rows], [ids[row["label"]] for row in rows])
    )
    dataset = dataset.shuffle(len(rows)).repeat().map(load, num_parallel_calls=workers)
    dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    dataset = dataset.with_options(options)
    print(json.dumps({"versions": {"tensorflow": tf.__version__}}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        for _ in dataset.take(request["batches"]):
            pass
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
