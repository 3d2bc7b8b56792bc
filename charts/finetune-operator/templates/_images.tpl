{{- /* Image patterns as CEL, part by part as the operator compares them (core/image_reference.py); a test compares the two. */ -}}

{{- /* The regular expression of one part from {text, any}: `any` is the class of characters that * stands for. */ -}}
{{- define "finetune-operator.imagePart" -}}
{{- .text | regexQuoteMeta | replace "\\*" (printf "[%s]*" .any) -}}
{{- end -}}

{{- /* A CEL condition on `c.image` that holds where the pattern allows it. */ -}}
{{- define "finetune-operator.imageCondition" -}}
{{- if eq . "*" -}}
true
{{- else -}}
{{- $name := splitList "@" . | first -}}
{{- $digest := splitList "@" . | rest | join "@" -}}
{{- $registry := "" -}}
{{- $first := splitList "/" $name | first -}}
{{- if and (contains "/" $name) (or (regexMatch "[.:]" $first) (has $first (list "localhost" "*"))) -}}
{{- $registry = $first -}}
{{- $name = splitList "/" $name | rest | join "/" -}}
{{- end -}}
{{- $tag := splitList ":" $name | rest | join ":" -}}
{{- $text := include "finetune-operator.imagePart" (dict "text" (splitList ":" $name | first) "any" "a-z0-9._/-") -}}
{{- $anyTag := ":[A-Za-z0-9_][A-Za-z0-9_.-]*" -}}
{{- $tagText := include "finetune-operator.imagePart" (dict "text" $tag "any" "A-Za-z0-9_.-") -}}
{{- if $digest -}}
{{- $text = printf "%s%s@%s" $text (ternary (printf ":%s" $tagText) (printf "(%s)?" $anyTag) (ne $tag "")) (include "finetune-operator.imagePart" (dict "text" $digest "any" "A-Za-z0-9+._:-")) -}}
{{- else if $tag -}}
{{- $text = printf "%s(:%s)%s" $text $tagText (ternary "?" "" (regexMatch (printf "^%s$" $tagText) "latest")) -}}
{{- else -}}
{{- $text = printf "%s(%s)?(@[A-Za-z0-9+._:-]+)?" $text $anyTag -}}
{{- end -}}
{{- if eq $registry "*" -}}
c.image.matches(r'^([A-Za-z0-9.:-]+/)?{{ $text }}$')
{{- else if $registry -}}
c.image.matches(r'^{{ include "finetune-operator.imagePart" (dict "text" $registry "any" "A-Za-z0-9.-") }}/{{ $text }}$')
{{- else -}}
(!c.image.matches(r'^([^/]*[.:][^/]*|localhost)/') && c.image.matches(r'^{{ $text }}$'))
{{- end -}}
{{- end -}}
{{- end -}}
