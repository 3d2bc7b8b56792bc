{{- /* The operator's settings (settings.py) by name; lists and maps are JSON. A test compares the two. */ -}}
{{- define "finetune-operator.env" -}}
{{- $operator := .Values.operator -}}
{{- $trainer := .Values.trainer -}}
{{- $policy := .Values.policy -}}
{{- $settings := dict
  "NAMESPACES" (include "finetune-operator.namespaces" . | fromJson).items
  "HTTP_PORT" 8080
  "LOG_LEVEL" $operator.logLevel
  "KUEUE" $operator.kueue
  "WORKERS" $operator.workers
  "RESYNC_SECONDS" $operator.resyncSeconds
  "REQUEST_TIMEOUT_SECONDS" $operator.requestTimeoutSeconds
  "START_TIMEOUT_SECONDS" $operator.startTimeoutSeconds
  "PROGRESS_INTERVAL_SECONDS" $operator.progressIntervalSeconds
  "PROGRESS_TIMEOUT_SECONDS" $operator.progressTimeoutSeconds
  "PROGRESS_CONCURRENCY" $operator.progressConcurrency
  "STALLED_SECONDS" $operator.stalledSeconds
  "STUCK_SECONDS" $operator.stuckSeconds
  "JOB_METRICS_LIMIT" $operator.jobMetricsLimit
  "GPU_PRICES" .Values.costs.gpuPrices
  "CURRENCY" .Values.costs.currency
  "COST_LABEL" .Values.costs.label
  "WATCH_SERVER_TIMEOUT_SECONDS" $operator.watches.serverTimeoutSeconds
  "WATCH_CLIENT_TIMEOUT_SECONDS" $operator.watches.clientTimeoutSeconds
  "WATCH_INACTIVITY_SECONDS" $operator.watches.inactivitySeconds
  "TRAINER_IMAGE" (include "finetune-operator.image" (dict "image" $trainer.image "root" .))
  "IMAGE_PULL_POLICY" $trainer.image.pullPolicy
  "IMAGE_PULL_SECRETS" $trainer.imagePullSecrets
  "TRAINER_SERVICE_ACCOUNT" $trainer.serviceAccountName
  "TRAINER_ENV" $trainer.env
  "NODE_SELECTOR" $trainer.nodeSelector
  "TOLERATIONS" $trainer.tolerations
  "POD_ANNOTATIONS" $trainer.podAnnotations
  "RUN_AS_USER" $trainer.runAsUser
  "TERMINATION_GRACE_SECONDS" $trainer.terminationGracePeriodSeconds
  "SCRATCH_SIZE_LIMIT" $trainer.scratchSizeLimit
  "DEFAULT_MEMORY" $trainer.defaultMemory
  "HOST_USERS" $trainer.hostUsers
  "ISOLATED_NAMESPACES" (.Values.networkPolicy.enabled | ternary (include "finetune-operator.trainerNamespaces" . | fromJson).items list)
  "ALLOWED_IMAGES" $policy.allowedImages
  "ALLOWED_S3_BUCKETS" $policy.allowedS3Buckets
  "ALLOWED_S3_ENDPOINTS" $policy.allowedS3Endpoints
  "ALLOWED_HUB_ENDPOINTS" $policy.allowedHubEndpoints
  "ALLOWED_GPU_RESOURCES" $policy.allowedGpuResources
  "ALLOWED_PRIORITY_CLASSES" $policy.allowedPriorityClasses
  "ALLOWED_RUNTIME_CLASSES" $policy.allowedRuntimeClasses
  "ALLOWED_TOLERATIONS" $policy.allowedTolerations
  "MAX_SHARED_MEMORY" $policy.maxSharedMemory
  "ALLOW_REMOTE_CODE" $policy.allowRemoteCode
  "MAX_GPUS_PER_JOB" $policy.maxGpusPerJob
  "MAX_GPUS_PER_JOB_BY_NAMESPACE" $policy.maxGpusPerJobByNamespace
-}}
{{- /* null is "none", which for the user is a choice and elsewhere the default */ -}}
{{- if kindIs "invalid" $policy.maxGpusPerJob }}{{ $settings = unset $settings "MAX_GPUS_PER_JOB" }}{{ end -}}
{{- range $name, $value := $settings }}
{{- if not (has $value (list "" list dict)) }}
- name: FINETUNE_OPERATOR_{{ $name }}
  value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
{{- end }}
{{- end -}}
