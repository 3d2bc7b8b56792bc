{{- define "finetune-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "finetune-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "finetune-operator.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "finetune-operator.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* What selects the operator's pod. These never change, for a Deployment's selector cannot. */ -}}
{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "finetune-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "finetune-operator.demoLabels" -}}
app.kubernetes.io/name: {{ include "finetune-operator.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "finetune-operator.labels" -}}
{{- include "finetune-operator.labelsWith" (dict "root" .) -}}
{{- end -}}

{{- /* The labels of an object: {root, component, labels}. `labels` win over commonLabels. Neither may hold a key of the
       chart's own: Services, policies, monitors and alerts find objects by them. */ -}}
{{- define "finetune-operator.labelsWith" -}}
{{- $own := dict
  "app.kubernetes.io/name" (include "finetune-operator.name" .root)
  "app.kubernetes.io/instance" .root.Release.Name
  "app.kubernetes.io/version" .root.Chart.AppVersion
  "app.kubernetes.io/part-of" "finetune-operator"
  "app.kubernetes.io/managed-by" .root.Release.Service
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
-}}
{{- with .component }}{{ $_ := set $own "app.kubernetes.io/component" . }}{{ end -}}
{{- $added := merge (dict) (default dict .labels) .root.Values.commonLabels -}}
{{- range $key, $_ := $added -}}
{{- if or (hasKey $own $key) (eq $key "app.kubernetes.io/component") -}}
{{- fail (printf "the label %s is set by the chart: take it out of commonLabels, podLabels and metrics.*.labels" $key) -}}
{{- end -}}
{{- end -}}
{{- merge $own $added | toYaml -}}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- default (include "finetune-operator.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- /* An image reference from {repository, tag, digest}, below image.registry; the tag defaults to the appVersion. */ -}}
{{- define "finetune-operator.image" -}}
{{- $name := .image.repository -}}
{{- with .root.Values.image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* Whether there is a Service of the operator: yes or nothing. */ -}}
{{- define "finetune-operator.hasService" -}}
{{- if or .Values.metrics.service.enabled .Values.metrics.serviceMonitor.enabled }}yes{{ end -}}
{{- end -}}

{{- /* Where pods of the release may run and how their images are pulled; trainers have settings of their own. */ -}}
{{- define "finetune-operator.placement" -}}
{{- $found := dict -}}
{{- range $key := list "imagePullSecrets" "nodeSelector" "tolerations" -}}
{{- with index $.Values $key }}{{ $_ := set $found $key . }}{{ end -}}
{{- end -}}
{{- with $found }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{- /* The watched namespaces as JSON: {"items": [...]}. No items: all of them. */ -}}
{{- define "finetune-operator.namespaces" -}}
{{- if and .Values.watch.allNamespaces .Values.watch.namespaces -}}
{{- fail "watch.namespaces must be empty when watch.allNamespaces is true" -}}
{{- end -}}
{{- if .Values.watch.allNamespaces -}}
{{- dict "items" list | toJson -}}
{{- else -}}
{{- dict "items" (default (list .Release.Namespace) .Values.watch.namespaces | uniq) | toJson -}}
{{- end -}}
{{- end -}}

{{- /* The namespaces that hold trainer pods, where they are known, as JSON: {"items": [...]}. */ -}}
{{- define "finetune-operator.trainerNamespaces" -}}
{{- if .Values.networkPolicy.trainer.namespaces -}}
{{- dict "items" (.Values.networkPolicy.trainer.namespaces | uniq) | toJson -}}
{{- else -}}
{{- include "finetune-operator.namespaces" . -}}
{{- end -}}
{{- end -}}

{{- /* What Pod Security Standards' "restricted" asks of a container, and a read-only root besides. */ -}}
{{- define "finetune-operator.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
readOnlyRootFilesystem: true
{{- end -}}

{{- define "finetune-operator.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.runAsUser }}
runAsUser: {{ int64 . }}
runAsGroup: {{ int64 . }}
fsGroup: {{ int64 . }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}
