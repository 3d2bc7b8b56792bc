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
app.kubernetes.io/name: {{ include "finetune-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: finetune-operator
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- default (include "finetune-operator.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- /* An image reference from {repository, tag, digest}; the tag defaults to the chart's appVersion. */ -}}
{{- define "finetune-operator.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
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

{{- /* A NetworkPolicy peer: the whole of a CIDR less the denied ones that lie in the same address family. */ -}}
{{- define "finetune-operator.cidrPeers" -}}
{{- $denied := .denied -}}
{{- range .cidrs }}
{{- $six := contains ":" . }}
{{- $except := list }}
{{- if or (eq . "0.0.0.0/0") (eq . "::/0") }}
{{- range $denied }}{{ if eq (contains ":" .) $six }}{{ $except = append $except . }}{{ end }}{{ end }}
{{- end }}
- ipBlock:
    cidr: {{ . | quote }}
    {{- with $except }}
    except: {{ toJson . }}
    {{- end }}
{{- end }}
{{- end -}}

{{- define "finetune-operator.dnsEgress" -}}
- to: {{- toYaml .Values.networkPolicy.dns.to | nindent 4 }}
  ports:
    {{- range .Values.networkPolicy.dns.ports }}
    - {protocol: UDP, port: {{ . }}}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
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
