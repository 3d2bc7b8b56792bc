"""Which fields a write has changed."""

from finetune_cli.kube.changes import changed_paths

JOB = {
    "metadata": {"name": "nli", "resourceVersion": "1", "generation": 1, "labels": {"team": "nlp"}},
    "spec": {"lora": {"rank": 16, "targetModules": ["q_proj"]}, "training": {"seed": 1}},
    "status": {"phase": "Pending"},
}


def test_what_the_server_and_the_operator_keep_is_no_change():
    metadata = JOB["metadata"] | {"resourceVersion": "9", "generation": 2, "managedFields": [{}]}
    assert changed_paths(JOB, JOB | {"metadata": metadata, "status": {"phase": "Running"}}) == []


def test_each_field_is_named_by_its_path():
    spec = {"lora": {"rank": 32, "targetModules": ["q_proj", "v_proj"]}, "training": {}, "suspend": True}
    metadata = JOB["metadata"] | {"labels": {"team": "ml"}}
    paths = ["metadata.labels.team", "spec.lora.rank", "spec.lora.targetModules", "spec.suspend", "spec.training.seed"]
    assert sorted(changed_paths(JOB, JOB | {"metadata": metadata, "spec": spec})) == paths


def test_what_nests_deep_is_named_by_what_holds_it():
    deep = other = 0
    for _ in range(500):
        deep, other = {"a": deep}, {"a": other or 1}
    assert changed_paths(JOB | {"spec": deep}, JOB | {"spec": other}) == ["spec" + ".a" * 7]
