{{- /* files/alerts.yaml, less the alerts switched off, plus the labels asked for. */ -}}
{{- define "finetune-operator.alerts" -}}
{{- $settings := .Values.metrics.prometheusRule -}}
{{- $groups := list -}}
{{- range (.Files.Get "files/alerts.yaml" | fromYaml).groups -}}
{{- $rules := list -}}
{{- range .rules -}}
{{- if not (has .alert $settings.disabledAlerts) -}}
{{- $rules = append $rules (set . "labels" (merge (dict) $settings.alertLabels (default dict .labels))) -}}
{{- end -}}
{{- end -}}
{{- $groups = append $groups (set . "rules" $rules) -}}
{{- end -}}
{{- dict "groups" $groups | toYaml -}}
{{- end -}}
