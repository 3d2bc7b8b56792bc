{{- /* NetworkPolicy peers less networkPolicy.deniedCidrs, whatever the other values open. */ -}}

{{- /* A CIDR's network part in binary digits behind its family, 4 or 6: a CIDR holds all those whose text begins with its. */ -}}
{{- define "finetune-operator.bits" -}}
{{- $address := splitList "/" . | first -}}
{{- $length := splitList "/" . | last | atoi -}}
{{- if contains ":" $address -}}
{{- $sides := splitList "::" $address -}}
{{- $left := splitList ":" (first $sides) | compact -}}
{{- $right := splitList ":" (rest $sides | join "") | compact -}}
{{- $gap := sub (sub 8 (len $left)) (len $right) | int -}}
{{- if or (contains "." $address) (lt $gap 0) (and (gt $gap 0) (ne (len $sides) 2)) -}}
{{- fail (printf "%s is not a CIDR: write IPv6 as groups of hexadecimal digits" .) -}}
{{- end -}}
{{- range $_ := until $gap }}{{ $left = append $left "0" }}{{ end -}}
{{- $bits := "" -}}
{{- range concat $left $right }}{{ $bits = printf "%s%016b" $bits (int64 (printf "0x%s" .)) }}{{ end -}}
6{{ substr 0 $length $bits }}
{{- else -}}
{{- $bits := "" -}}
{{- range splitList "." $address }}{{ $bits = printf "%s%08b" $bits (atoi .) }}{{ end -}}
4{{ substr 0 $length $bits }}
{{- end -}}
{{- end -}}

{{- /* Peers as JSON, {"items": [...]}, from {root, peers, where}: each ipBlock less the denied CIDRs in it. One that lies in
       a denied CIDR is refused with its place, `where`; with none it is let through (a DNS server on its own port). */ -}}
{{- define "finetune-operator.peers" -}}
{{- $where := .where -}}
{{- $denied := .root.Values.networkPolicy.deniedCidrs -}}
{{- $peers := list -}}
{{- range .peers -}}
{{- if .ipBlock -}}
{{- $cidr := .ipBlock.cidr -}}
{{- $ours := include "finetune-operator.bits" $cidr -}}
{{- $except := default list .ipBlock.except -}}
{{- range $denied -}}
{{- $theirs := include "finetune-operator.bits" . -}}
{{- if hasPrefix $theirs $ours -}}
{{- if $where }}{{ fail (printf "%s: %s lies in %s of networkPolicy.deniedCidrs: take one of them out" $where $cidr .) }}{{ end -}}
{{- else if hasPrefix $ours $theirs -}}
{{- $except = append $except . -}}
{{- end -}}
{{- end -}}
{{- $block := dict "cidr" $cidr -}}
{{- with $except }}{{ $_ := set $block "except" (uniq .) }}{{ end -}}
{{- $peers = append $peers (dict "ipBlock" $block) -}}
{{- else -}}
{{- $peers = append $peers . -}}
{{- end -}}
{{- end -}}
{{- dict "items" $peers | toJson -}}
{{- end -}}

{{- /* Egress to CIDRs on TCP ports: {root, cidrs, ports, where}. */ -}}
{{- define "finetune-operator.cidrEgress" -}}
{{- $peers := list -}}
{{- range .cidrs }}{{ $peers = append $peers (dict "ipBlock" (dict "cidr" .)) }}{{ end -}}
- to: {{- (include "finetune-operator.peers" (dict "root" .root "peers" $peers "where" .where) | fromJson).items | toYaml | nindent 4 }}
  ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end -}}

{{- /* Egress rules of the user's: {root, rules, where}. */ -}}
{{- define "finetune-operator.extraEgress" -}}
{{- $rules := list -}}
{{- range .rules -}}
{{- $peers := (include "finetune-operator.peers" (dict "root" $.root "peers" .to "where" $.where) | fromJson).items -}}
{{- $rules = append $rules (merge (dict "to" $peers) .) -}}
{{- end -}}
{{- with $rules }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{- define "finetune-operator.dnsEgress" -}}
- to: {{- (include "finetune-operator.peers" (dict "root" . "peers" .Values.networkPolicy.dns.to) | fromJson).items | toYaml | nindent 4 }}
  ports:
    {{- range .Values.networkPolicy.dns.ports }}
    - {protocol: UDP, port: {{ . }}}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end -}}
