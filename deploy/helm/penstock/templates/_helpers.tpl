{{/* The names of objects: at most 52 characters, so that "-migrate" and a hash fit. */}}
{{- define "penstock.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $whole := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $whole .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{/* What a pod is found by. Takes a list: the root and the part, such as "api". */}}
{{- define "penstock.selector" -}}
{{- $root := first . -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with last . }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "penstock.labels" -}}
{{- $root := first . -}}
{{ include "penstock.selector" . }}
app.kubernetes.io/version: {{ default $root.Chart.AppVersion $root.Values.image.tag | trunc 63 | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- end -}}

{{- define "penstock.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "penstock.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "penstock.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{/* How long the process may take to end: open requests, then lines in flight, then 5 s. */}}
{{- define "penstock.endSeconds" -}}
{{ add (mul 2 (int .Values.shutdownGraceSeconds)) 10 }}
{{- end -}}

{{/* Says what is missing before anything is made. */}}
{{- define "penstock.check" -}}
{{- if not (or .Values.database.url .Values.database.existingSecret) -}}
{{- fail "database.url or database.existingSecret must be given: a cluster needs PostgreSQL." -}}
{{- end -}}
{{- if and .Values.database.url .Values.database.existingSecret -}}
{{- fail "Of database.url and database.existingSecret only one may be given." -}}
{{- end -}}
{{- if not .Values.storage.url -}}
{{- fail "storage.url must be given, such as s3://bucket/prefix: the pods share no disk." -}}
{{- end -}}
{{- if and .Values.apiKey.value .Values.apiKey.existingSecret -}}
{{- fail "Of apiKey.value and apiKey.existingSecret only one may be given." -}}
{{- end -}}
{{- if not (or .Values.apiKey.value .Values.apiKey.existingSecret .Values.config.projects) -}}
{{- fail "apiKey.value, apiKey.existingSecret or config.projects must be given: without one each first pod would make a key of its own." -}}
{{- end -}}
{{- range .Values.storage.env | keys -}}
{{- if hasKey $.Values.storage.credentials . -}}
{{- fail (printf "%s stands in storage.env and in storage.credentials; one is enough." .) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.worker.autoscaling.enabled (lt (int .Values.worker.autoscaling.maxReplicas) (int .Values.worker.autoscaling.minReplicas)) -}}
{{- fail "worker.autoscaling.maxReplicas must not be below minReplicas." -}}
{{- end -}}
{{- end -}}

{{/* A key as TOML: only patterns of models need quotes. */}}
{{- define "penstock.tomlKey" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{/* A value as TOML. JSON's strings, numbers and truth values are TOML's too. */}}
{{- define "penstock.tomlValue" -}}
{{- if kindIs "map" . -}}
{ {{- range $i, $key := keys . | sortAlpha }}{{ if $i }}, {{ end }}{{ include "penstock.tomlKey" $key }} = {{ include "penstock.tomlValue" (get $ $key) }}{{ end -}} }
{{- else if kindIs "slice" . -}}
[{{- range $i, $item := . }}{{ if $i }}, {{ end }}{{ include "penstock.tomlValue" $item }}{{ end -}}]
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end -}}

{{- define "penstock.tomlTable" -}}
{{- range $key := keys . | sortAlpha }}
{{ $key }} = {{ include "penstock.tomlValue" (get $ $key) }}
{{- end }}
{{- end -}}

{{/* penstock.toml: tables, then lists of tables. */}}
{{- define "penstock.toml" -}}
{{- range $name := keys .Values.config | sortAlpha }}
{{- $part := get $.Values.config $name }}
{{- if kindIs "map" $part }}
[{{ $name }}]
{{- include "penstock.tomlTable" $part }}
{{ end }}
{{- end }}
{{- range $name := keys .Values.config | sortAlpha }}
{{- $part := get $.Values.config $name }}
{{- if kindIs "slice" $part }}
{{- range $part }}
[[{{ $name }}]]
{{- include "penstock.tomlTable" . }}
{{ end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What a secret of ours holds: variables by name. */}}
{{- define "penstock.secretData" -}}
{{- range $name := keys .Values.secretEnv | sortAlpha }}
{{ $name }}: {{ get $.Values.secretEnv $name | toString | b64enc | quote }}
{{- end }}
{{- range $name := keys .Values.storage.credentials | sortAlpha }}
{{ $name }}: {{ get $.Values.storage.credentials $name | toString | b64enc | quote }}
{{- end }}
{{- with .Values.database.url }}
PENSTOCK_DATABASE_URL: {{ b64enc . | quote }}
{{- end }}
{{- with .Values.apiKey.value }}
PENSTOCK_API_KEY: {{ b64enc . | quote }}
{{- end }}
{{- end -}}

{{/* The variables of API and workers. Takes a list: the root and those of the part. */}}
{{- define "penstock.env" -}}
{{- $root := first . -}}
- {name: PENSTOCK_CONFIG, value: /etc/penstock/penstock.toml}
- {name: PENSTOCK_DATA_DIR, value: /data}
- {name: PENSTOCK_STORAGE_URL, value: {{ $root.Values.storage.url | quote }}}
- {name: PENSTOCK_SERVER__HOST, value: "0.0.0.0"}
- {name: PENSTOCK_SERVER__SHUTDOWN_GRACE_S, value: {{ $root.Values.shutdownGraceSeconds | quote }}}
{{- range $name := keys (last .) | sortAlpha }}
- {name: {{ $name }}, value: {{ get (last $) $name | quote }}}
{{- end }}
{{- with $root.Values.database.existingSecret }}
- name: PENSTOCK_DATABASE_URL
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $root.Values.database.key | quote }}}}
{{- end }}
{{- with $root.Values.apiKey.existingSecret }}
- name: PENSTOCK_API_KEY
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $root.Values.apiKey.key | quote }}}}
{{- end }}
{{- range $name := keys $root.Values.storage.env | sortAlpha }}
- {name: {{ $name }}, value: {{ get $root.Values.storage.env $name | toString | quote }}}
{{- end }}
{{- range $name := keys $root.Values.env | sortAlpha }}
- {name: {{ $name }}, value: {{ get $root.Values.env $name | toString | quote }}}
{{- end }}
{{- end -}}

{{- define "penstock.envFrom" -}}
{{- if include "penstock.secretData" . }}
- secretRef: {name: {{ include "penstock.fullname" . }}}
{{- end }}
{{- with .Values.storage.existingSecret }}
- secretRef: {name: {{ . | quote }}}
{{- end }}
{{- range .Values.secretEnvFrom }}
- secretRef: {name: {{ . | quote }}}
{{- end }}
{{- end -}}

{{- define "penstock.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "penstock.writableMounts" -}}
- {name: data, mountPath: /data}
- {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "penstock.writableVolumes" -}}
- {name: data, emptyDir: {}}
- {name: tmp, emptyDir: {}}
{{- end -}}

{{/* A pod of API or workers, without its container. Takes a list: the root, part, values. */}}
{{- define "penstock.podMetadata" -}}
{{- $root := first . -}}
{{- $part := index . 1 -}}
{{- $values := last . -}}
annotations:
  checksum/config: {{ include "penstock.toml" $root | sha256sum }}
  checksum/secret: {{ include "penstock.secretData" $root | sha256sum }}
  {{- with $values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
labels:
  {{- merge (fromYaml (include "penstock.labels" (list $root $part))) $values.podLabels $root.Values.serviceAccount.labels | toYaml | nindent 2 }}
{{- end -}}

{{- define "penstock.podPlacement" -}}
{{- $root := first . -}}
{{- $part := index . 1 -}}
{{- $values := last . -}}
serviceAccountName: {{ include "penstock.serviceAccountName" $root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - {name: {{ . | quote }}}
  {{- end }}
{{- end }}
{{- with $root.Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $values.topologySpread.enabled }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ $values.topologySpread.topologyKey }}
    whenUnsatisfiable: {{ $values.topologySpread.whenUnsatisfiable }}
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- include "penstock.selector" (list $root $part) | nindent 8 }}
{{- end }}
volumes:
  - name: config
    configMap: {name: {{ include "penstock.fullname" $root }}}
  {{- include "penstock.writableVolumes" $root | nindent 2 }}
{{- end -}}

{{/* Probes of a part, on its named port. */}}
{{- define "penstock.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: {{ . }}}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: {{ . }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: {{ . }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end -}}
