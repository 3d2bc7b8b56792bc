"""Cause and fix of every reason that the operator itself gives; tests/docs compares the list with its code."""

from typing import Final, NamedTuple


class Reason(NamedTuple):
    """`cure` is empty where nothing is wrong."""

    cause: str
    cure: str = ""


NOTHING: Final = "Nothing to do."

#: How an attempt ended (status.attempts[].reason) without an exit code that explains itself.
ATTEMPTS: Final = {
    "NodeLost": Reason(
        "The pod was evicted or its node lost: drained, preempted by a higher priority, spot reclaimed, node gone.",
        "Nothing to do: the next attempt resumes from the last checkpoint, and this one does not count.",
    ),
    "Suspended": Reason("Stopped by `spec.suspend`.", "Set `spec.suspend: false`, or `finetune resume NAME`."),
    "JobDeleted": Reason(
        "Somebody deleted the attempt's Job; or the operator did, because one of its pods had lost the labels by which"
        " Kubernetes knows it, so that Kubernetes started another beside it.",
        "The operator retries. To stop a job, use `spec.suspend` or delete the FineTuneJob.",
    ),
    "SpecChanged": Reason(
        "The spec was changed after the attempt's Job was created and before the attempt was recorded; or `spec.image`,"
        " before a pod of the job was known to run.",
        "Nothing to do: the next attempt runs the spec as it is now, if the administrator's rules allow it.",
    ),
    "JobRefused": Reason(
        "Somebody else created a Job under the name of the next attempt, with this FineTuneJob as its owner; or the"
        " operator's settings changed between the creation of the attempt's Job and its record. The operator deletes"
        " such a Job and never takes it for an attempt.",
        "Nothing to do: the next attempt follows. If it repeats, find out who may create Jobs in the namespace.",
    ),
    "PodLost": Reason(
        "The Job failed without a container exit code; most often the pod was removed by hand or by a node's cleanup.",
        "The operator retries. Look at `kubectl get events` of that time when it repeats.",
    ),
    "InitContainerFailed": Reason(
        "An init container, which a webhook or mesh added to the pod, failed, so that the trainer never started.",
        "Read the init container's exit code and last lines in the message. The operator retries.",
    ),
    "ReportLost": Reason(
        "The trainer exited 0, but its pod was gone before its report was read, or its report is none of this job's.",
        "Nothing to do: the next attempt finds this job's own manifest in the store, verifies it and succeeds.",
    ),
    "JobDeadlineExceeded": Reason(
        "The attempt's Job or pod ran into an `activeDeadlineSeconds` of its own, which this operator never sets: an"
        " admission policy or a webhook does.",
        "Except these Jobs from the policy. The operator retries from the last checkpoint, up to"
        " `recovery.maxAttempts`; save more often (`checkpoint.everySteps`) than the deadline strikes.",
    ),
    "TrainerCrashed": Reason(
        "The trainer exited with a code that is not in the table above: an unexpected error.",
        "Read `finetune logs NAME`; the traceback is there. The operator retries up to `recovery.maxAttempts`.",
    ),
}

#: Succeeded=False (and Accepted=False) without an attempt to blame.
ENDINGS: Final = {
    "ConfigInvalid": Reason(
        "The spec breaks a rule of this version: it was stored by an older definition, or without validation.",
        "Change the field the message names; `finetune validate` shows the same sentence.",
    ),
    "PolicyRefused": Reason(
        "The spec breaks a rule of the administrator; the message names field, rule and what is allowed.",
        "Change the field, or ask the administrator to change `policy` in the chart's values.",
    ),
    "DeadlineExceeded": Reason(
        "The attempts together ran longer than `activeDeadlineSeconds`.",
        "Raise it (it may change at any time before the end), or train fewer steps.",
    ),
    "PendingDeadlineExceeded": Reason(
        "The pods did not start within `pendingDeadlineSeconds`; the message ends with what they waited for.",
        "Cure that, or raise the deadline, and create the job again.",
    ),
}

#: Scheduled=False: why nothing runs yet, or just now.
WAITS: Final = {
    "Pending": Reason(
        "The pods are about to start; after 10 s the message names what they wait for.",
        "Nothing to do. If it lasts: `kubectl describe` what the message names.",
    ),
    "OutputInUse": Reason(
        "Another job of the namespace that is not over has the same `output.uri`; the message names it. The one"
        " that has begun goes first, else the older. No GPU is held.",
        "Give this job its own `output.uri` (it may change until training begins; `{name}` in it stands for the job's"
        " name), or wait: it starts once the other is over or deleted.",
    ),
    "Queued": Reason(
        "Kueue has not admitted the Job, or somebody else suspended it; the message repeats Kueue's sentence.",
        "Wait, or look at the quota: `kubectl describe workloads`. A Job that somebody suspended by hand: set its"
        " `spec.suspend` to false.",
    ),
    "ParallelismChanged": Reason(
        "Somebody set `parallelism` of the attempt's Job below the number of nodes, so Kubernetes stopped its pods.",
        "Set it back as the message says, or delete the Job: a new attempt resumes from the last checkpoint.",
    ),
    "Unschedulable": Reason(
        "No node fits; the message is the scheduler's own sentence.",
        "Compare `spec.resources` (GPUs, `gpuResource`, memory, node selector, tolerations) with"
        " `kubectl describe nodes`; check that the device plugin runs.",
    ),
    "FailedCreate": Reason(
        "The Job controller cannot create the pod: quota, Pod Security, a webhook, a missing ServiceAccount.",
        "Cure what the message says; the Job controller tries again by itself.",
    ),
    "FailedMount": Reason(
        "A volume cannot be mounted: most often a Secret or a claim of that name does not exist in the namespace.",
        "Create the Secret or PersistentVolumeClaim the message names; the pod then starts by itself.",
    ),
    "FailedAttachVolume": Reason(
        "The volume cannot be attached to the node: it is in use elsewhere, or in another zone.",
        "Use a ReadWriteMany claim for caches and for several nodes; check the storage driver.",
    ),
    "FailedCreatePodSandBox": Reason(
        "The node cannot set the pod up: most often its network, or a runtime class it does not know.",
        "Look at the node's network plugin and at `resources.runtimeClassName`; the kubelet tries again by itself.",
    ),
    "NodeUnreachable": Reason(
        "A pod is past its grace period, but its node has not confirmed that it stopped: the node is down or cut off."
        " The pod may still write, so the next attempt waits.",
        "Bring the node back, or make sure that it is off and delete it: `kubectl delete node NODE`.",
    ),
    "BackingOff": Reason(
        "An attempt failed with an error that a retry may solve; the message says when the next one starts.",
        "Nothing to do, or read the last attempt's reason in `status.attempts`.",
    ),
    "Stopping": Reason("Something of an earlier attempt is still ending; there are never two writers.", NOTHING),
    "QuotaExceeded": Reason(
        "The namespace's ResourceQuota denies the Job.", "Free quota or raise it; the operator retries."
    ),
    "Forbidden": Reason(
        "The API server does not let the operator create the attempt's Job, Service or NetworkPolicy: its RBAC lacks"
        " the right, or an admission policy denies it.",
        "Install the chart's Role in this namespace (`watch.namespaces`), or change the policy the message names.",
    ),
    "Rejected": Reason(
        "The API server calls the attempt's Job invalid: most often a quantity, affinity or toleration in"
        " `spec.resources`.",
        "Change the field the message names.",
    ),
    "LabelsReplaced": Reason(
        "An admission webhook changes the labels or the owner of the attempt's Job or of its pods. By them the operator"
        " finds what it runs, so it deletes such a Job at once: there must never be two writers.",
        "Exclude objects with the label `app.kubernetes.io/managed-by=finetune-operator` from the webhook.",
    ),
    "NameConflict": Reason(
        "The attempt needs a Job, Service or NetworkPolicy of a name that is taken: what has it belongs to somebody"
        " else, or has other content than the operator gives it.",
        "Delete what the message names, or create it anew under another name; the operator tries again by itself.",
    ),
}

#: Reasons that only tell where the job stands.
STATES: Final = {
    "Valid": Reason("Accepted: the spec is right and allowed."),
    "PodsRunning": Reason("Scheduled: every pod runs."),
    "NotRunning": Reason("Training: no pod runs yet."),
    "Starting": Reason("Training: the trainer has not reported yet."),
    "CheckingData": Reason("Training: configuration, credentials, every data row and the output are checked."),
    "LoadingModel": Reason("Training: the base weights are fetched and loaded."),
    "Training": Reason("Training: training is running."),
    "Evaluating": Reason("Training: the held-out rows are measured."),
    "Publishing": Reason("Training: the adapter goes to the store."),
    "Verifying": Reason("Training: the published adapter is loaded back."),
    "Finishing": Reason("Training: the trainer is done; its pod is about to end."),
    "Finished": Reason("Scheduled, Training: the job is over."),
    "NotSuspended": Reason("Suspended: it is not."),
    "Suspending": Reason("Suspended: the trainer saves a checkpoint and stops."),
    "Resuming": Reason("Suspended: the old pods end, then the next attempt starts."),
    "NotYet": Reason("Published: the adapter is published at the end."),
    "Reported": Reason("Published: the trainer reports that it published the adapter, read it back and loaded it."),
    "Succeeded": Reason("Succeeded, Finished: the adapter is in `status.adapter`."),
    "Failed": Reason("Finished: the job has failed; `Succeeded` says why."),
    "NotFinished": Reason("Finished: the job is not over."),
}

STALLED: Final = {
    "NotAnswering": Reason(
        "Training=Unknown: the trainer, which had reported before, has missed three polls in a row; the message says"
        " since when. Its node is down or cut off, or a NetworkPolicy blocks port 9400.",
        "Look at the pod's node (`kubectl get nodes`). Once Kubernetes gives the node up, after five minutes as a"
        " rule, it replaces the pod. `Training` returns by itself when the trainer answers.",
    ),
    "Stalled": Reason(
        "Training=False: the trainer has reported neither another step nor another stage for `operator.stalledSeconds`"
        " (30 minutes).",
        "Read `finetune logs NAME`. A hung collective on several nodes: suspend and resume the job, it resumes from the"
        " last checkpoint. Very long steps or downloads: raise the setting.",
    ),
}

#: Events on the FineTuneJob, besides the reasons above (each is posted once an attempt).
EVENTS: Final = {
    "AttemptStarted": Reason("A Job was created."),
    "Resumed": Reason("`spec.suspend` is false again."),
    "Recovered": Reason("The trainer reports again after it had stalled or not answered."),
    "PodDisrupted": Reason(
        "Kubernetes evicted or preempted a pod of the attempt, or lost its node; the message is its own. A pod of one"
        " node is replaced, and resumes from the last checkpoint. `status.attempts[].disruptions` counts them."
    ),
    "ResumedFromCheckpoint": Reason(
        "Training resumed at the step that the message names. A Warning when an earlier FineTuneJob saved that"
        " checkpoint: to start at step 0, choose another `output.uri`, or delete its checkpoints."
    ),
    "AttemptEnded": Reason("An attempt ended without success; the message holds its reason."),
}

#: Reasons of a FineTuneSweep and of its trials' rows, and events on it.
SWEEPS: Final = {
    "NoTrialSucceeded": Reason(
        "All trials of a sweep have ended, and none published an adapter.",
        "Read the reasons in `status.trials`, and one of the FineTuneJobs: they often share a cause.",
    ),
    "Outperformed": Reason(
        "`earlyStopping` stopped the trial: after one of the steps in `earlyStopping.rungs` its evalLoss was not among"
        " the best. The event `TrialStopped` names it.",
        "Nothing to do. Its checkpoint stays; a smaller `reductionFactor` stops fewer.",
    ),
    "Unfinished": Reason(
        "The process that the trial shared ended for good before the trial did.",
        "Nothing to do: it goes on in a FineTuneJob of its own, from its checkpoint.",
    ),
    "Deleted": Reason(
        "Somebody deleted the trial's FineTuneJob before it ended.",
        "The sweep does not create it again. To try it once more, create another sweep, or the job by itself.",
    ),
    "TrialStopped": Reason("Event on the sweep: `earlyStopping` stopped a trial.", NOTHING),
    "TrialDeleted": Reason(
        "Event on the sweep: the FineTuneJob of a trial that had not ended is gone.", "As for `Deleted`."
    ),
    "PackEnded": Reason(
        "Event on the sweep: a FineTuneJob that trials share ended for good before all of them had, or its trainer told"
        " nothing of them. An older image does not know such jobs and refuses them (`ConfigInvalid`).",
        "Nothing to do: each of the others goes on in a FineTuneJob of its own. `finetune status` of the"
        " FineTuneJob that the event names says why; `packing: disabled` spares the failed start.",
    ),
}

ALL: Final = {**ATTEMPTS, **ENDINGS, **WAITS, **STATES, **STALLED, **EVENTS, **SWEEPS}
