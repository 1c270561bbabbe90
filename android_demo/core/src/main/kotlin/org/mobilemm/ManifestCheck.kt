package org.mobilemm

import java.text.Normalizer

/** Checks what a manifest's types cannot say. Raises [KeyFault] at the first thing that does not hold together. */
internal fun checkAgreement(manifest: Manifest) {
    fileFaults(manifest)
    modelFaults(manifest)
    tokenFaults(manifest)
    drawingFaults(manifest)
    if (manifest.target == "onnx") onnxFaults(manifest)
}

private fun fault(keyAndFault: Pair<String, String>): Nothing = throw KeyFault(keyAndFault.first, keyAndFault.second)

private fun fileFaults(manifest: Manifest) {
    val listed = HashMap<String, String>()
    for ((index, file) in manifest.files.withIndex()) {
        val folded = Normalizer.normalize(file.path, Normalizer.Form.NFC).lowercase()
        val key = "files.$index.path"
        if (folded == Bundle.MANIFEST || folded == Bundle.MANIFEST_SHA256) fault(key to "the manifest cannot list itself")
        listed.put(folded, file.path)?.let { fault(key to "${shown(file.path)} and ${shown(it)} are one file on some phones") }
    }
    val sizes = manifest.files.associate { it.path to it.bytes }

    fun known(
        key: String,
        path: String,
    ) {
        if (path !in sizes) fault(key to "${shown(path)} is not listed under 'files'")
    }
    if (manifest.parts.isEmpty()) fault("parts" to "there is none")
    for ((name, part) in manifest.parts) {
        part.files.forEachIndexed { index, path -> known("parts.$name.files.$index", path) }
        if (part.files.toSet().size < part.files.size) fault("parts.$name.files" to "a file stands there twice")
        val isPackage = manifest.target == "coreml" && part.files.all { it.startsWith("${part.file}/") }
        if (part.file !in part.files && !isPackage) {
            fault("parts.$name.file" to "${shown(part.file)} is not among the part's 'files'")
        }
        val total = part.files.sumOf { sizes[it] ?: 0 }
        if (part.bytes != total) fault("parts.$name.bytes" to "is ${part.bytes}, but the part's files have $total")
        for ((side, tensors) in mapOf("inputs" to part.inputs, "outputs" to part.outputs)) {
            if (tensors.map { it.name }.toSet().size < tensors.size) fault("parts.$name.$side" to "two have one name")
        }
    }
    known("prompt.tokenizer", manifest.prompt.tokenizer)
    for ((index, golden) in manifest.golden.withIndex()) {
        known("golden.$index.file", golden.file)
        if (golden.part !in manifest.parts) fault("golden.$index.part" to "there is no part ${shown(golden.part)}")
    }
    for ((index, conversation) in manifest.conversations.withIndex()) {
        val picture = conversation.image ?: continue
        known("conversations.$index.image", picture)
        if (manifest.image == null) {
            fault("conversations.$index.image" to "the bundle takes no pictures (key 'image' is null)")
        }
    }
}

private fun modelFaults(manifest: Manifest) {
    val model = manifest.model
    if (model.numAttentionHeads % model.numKeyValueHeads != 0) {
        fault("model.num_key_value_heads" to "does not divide the ${model.numAttentionHeads} attention heads")
    }
    val image = manifest.image ?: return
    if (model.numImageTokens !in 1 until model.contextLength) {
        fault(
            "model.num_image_tokens" to
                "is ${model.numImageTokens}; a picture must leave room in a context of ${model.contextLength}",
        )
    }
    if ((image.strategy == "crop") != (image.shortestEdge != null)) {
        fault("image.shortest_edge" to "must be given with the strategy \"crop\" and with no other")
    }
    if (image.shortestEdge != null && image.shortestEdge < maxOf(image.height, image.width)) {
        fault("image.shortest_edge" to "is less than what is cut out (${image.height} × ${image.width})")
    }
    if (image.positionGrid != null && image.positionGrid[0].toLong() * image.positionGrid[1] != model.numImageTokens.toLong()) {
        fault("image.position_grid" to "is not that of ${model.numImageTokens} image tokens")
    }
}

private fun tokenFaults(manifest: Manifest) {
    val model = manifest.model

    fun known(
        key: String,
        ids: List<Int>,
        placeholder: Boolean = false,
    ) {
        for (id in ids) {
            if (id >= model.vocabSize && !(placeholder && id == model.imageTokenId)) {
                fault(key to "token $id is not in a vocabulary of ${model.vocabSize}")
            }
        }
    }
    known("model.bos_token_id", listOfNotNull(model.bosTokenId))
    known("model.eos_token_ids", model.eosTokenIds)
    known("model.pad_token_id", listOf(model.padTokenId))
    manifest.prompt.examples.forEachIndexed { index, example ->
        known("prompt.examples.$index.input_ids", example.inputIds, placeholder = true)
    }
    manifest.conversations.forEachIndexed { index, conversation ->
        known("conversations.$index.input_ids", conversation.inputIds, placeholder = true)
        known("conversations.$index.answer_ids", conversation.answerIds)
        val length = conversation.inputIds.size + conversation.answerIds.size
        if (length > model.contextLength) {
            fault("conversations.$index" to "$length tokens do not fit a context of ${model.contextLength}")
        }
    }
}

private val FLOATS = setOf("float32", "float16")

/** Whether the parts' tensors are those of the ONNX contract, in the model's sizes. */
private fun onnxFaults(manifest: Manifest) {
    val model = manifest.model
    val image = manifest.image
    for ((name, part) in manifest.parts) {
        if (!part.file.endsWith(".onnx")) fault("parts.$name.file" to "must be an .onnx file in a bundle for onnx")
    }
    for (name in if (image == null) listOf("embed", "decoder") else listOf("vision", "embed", "decoder")) {
        if (name !in manifest.parts) fault("parts" to "the part '$name' is missing")
    }
    if (image == null && "vision" in manifest.parts) fault("image" to "is null, but there is a part 'vision'")
    val hidden = model.hiddenSize.toLong()
    val embed = manifest.parts.getValue("embed")
    val decoder = manifest.parts.getValue("decoder")
    if (image != null) {
        val vision = manifest.parts.getValue("vision")
        val pixels = listOf(null, 3L, image.height.toLong(), image.width.toLong())
        tensorFault("parts.vision.inputs", vision.inputs, "pixels", pixels, setOf("uint8"))
        tensorFault("parts.vision.outputs", vision.outputs, "image_features", listOf(null, hidden))
        tensorFault("parts.embed.inputs", embed.inputs, "image_features", listOf(null, hidden))
    }
    tensorFault("parts.embed.inputs", embed.inputs, "input_ids", listOf(null, null), setOf("int64", "int32"))
    tensorFault("parts.embed.outputs", embed.outputs, "inputs_embeds", listOf(null, null, hidden))
    tensorFault("parts.decoder.inputs", decoder.inputs, "inputs_embeds", listOf(null, null, hidden))
    tensorFault("parts.decoder.outputs", decoder.outputs, "logits", listOf(null, null, model.vocabSize.toLong()))
    val cache = listOf(null, model.numKeyValueHeads.toLong(), null, model.headDim.toLong())
    for ((side, tensors, stem) in listOf(
        Triple("inputs", decoder.inputs, "past_key_values."),
        Triple("outputs", decoder.outputs, "present."),
    )) {
        // Layers are counted first: a stranger's number of them must not make millions of names.
        val found = tensors.map { it.name }.filter { it.startsWith(stem) }.toSet()
        val wanted = if (found.size != 2 * model.numLayers) null else cacheNames(stem, model.numLayers)
        if (wanted == null || found != wanted.toSet()) {
            fault(
                "parts.decoder.$side" to
                    "keys and values of ${found.size / 2} layers, where the model has ${model.numLayers}",
            )
        }
        for (name in wanted) tensorFault("parts.decoder.$side", tensors, name, cache, FLOATS + "int8")
    }
}

/** Whether what draws is there, whole, and of one size throughout. */
private fun drawingFaults(manifest: Manifest) {
    val generation = manifest.generation ?: return
    val schedules = generation.schedules
    val wanted = if (schedules == null) listOf("generator") else STEPWISE
    for (name in listOf("output_projector") + wanted) {
        if (name !in manifest.parts) fault("generation" to "the part '$name' is missing")
    }
    for (name in STEPWISE + "generator" - wanted.toSet()) {
        val are = if (schedules == null) "miss" else "are"
        if (name in manifest.parts) fault("generation.schedules" to "$are, but there is a part '$name'")
    }
    val projector = manifest.parts.getValue("output_projector")
    val signals = generation.signalTokenIds
    if (signals.last() >= manifest.model.vocabSize || signals.indices.any { signals[it].toLong() != signals[0].toLong() + it }) {
        fault("generation.signal_token_ids" to "must follow each other, inside the vocabulary")
    }
    if (generation.noiseShape.fold(1.0) { product, size -> product * size } > Noise.MOST) {
        fault("generation.noise.shape" to "has more than ${Noise.MOST} numbers")
    }
    val known = (projector.inputs + projector.outputs).associate { it.name to it.shape }
    val words = known["signal_logits"]?.lastOrNull() as? Long
    if (words == null || words > manifest.model.vocabSize) {
        fault("parts.output_projector.inputs" to "'signal_logits' must end in some of the vocabulary's words")
    }
    val condition = known["condition"].orEmpty().map { it as? Long }
    if (condition.isEmpty() || null in condition) {
        fault("parts.output_projector.outputs" to "'condition' must have a fixed shape")
    }
    val logits = listOf(1L, signals.size.toLong(), words)
    interfaceFaults(manifest, "output_projector", mapOf("signal_logits" to logits), mapOf("condition" to condition))
    val picture = mapOf("picture" to listOf(1L, 3L, generation.height.toLong(), generation.width.toLong()))
    if (schedules == null) {
        interfaceFaults(manifest, "generator", mapOf("condition" to condition, "noise" to generation.noiseShape), picture)
        return
    }
    scheduleFaults(generation, schedules)
    val latents = listOf(1L) + generation.noiseShape.drop(2)
    val inputs = mapOf("latents" to latents, "condition" to condition, "noise" to latents, "scales" to listOf(5L))
    interfaceFaults(manifest, "denoiser", inputs, mapOf("next_latents" to latents))
    interfaceFaults(manifest, "image_decoder", mapOf("latents" to latents), picture)
}

/** Whether a part has these tensors of floating-point numbers, and no other. */
private fun interfaceFaults(
    manifest: Manifest,
    name: String,
    inputs: Map<String, List<Long?>>,
    outputs: Map<String, List<Long?>>,
) {
    val part = manifest.parts.getValue(name)
    for ((side, tensors, shapes) in listOf(Triple("inputs", part.inputs, inputs), Triple("outputs", part.outputs, outputs))) {
        for ((tensor, shape) in shapes) tensorFault("parts.$name.$side", tensors, tensor, shape)
        for (tensor in tensors) {
            if (tensor.name !in shapes) fault("parts.$name.$side" to "${shown(tensor.name)} is none that a session knows")
        }
    }
}

/** Whether there is one for each number of steps, and noise for all. */
private fun scheduleFaults(
    generation: Generation,
    schedules: List<List<FloatArray>>,
) {
    val rows = schedules.firstOrNull { it.size == generation.steps }
    if (rows == null || schedules.map { it.size }.toSet().size < schedules.size) {
        fault("generation.schedules" to "must be one for each number of steps, ${generation.steps} among them")
    }
    val shape = generation.noiseShape
    val noises = PictureGenerator.noises(rows)
    if (shape.size != 5 || shape[0] != 1L || shape[1] != noises.toLong()) {
        fault("generation.noise.shape" to "is (${shape.joinToString()}), where (1, $noises, channels, height, width) is expected")
    }
    if (shape.drop(2).fold(schedules.maxOf(PictureGenerator::noises).toDouble()) { product, size -> product * size } > Noise.MOST) {
        fault("generation.schedules" to "take more than ${Noise.MOST} numbers of noise")
    }
}

private val STEPWISE = listOf("denoiser", "image_decoder")

/** The cache's tensors, layer by layer: `past_key_values.0.key`, `past_key_values.0.value`, … */
internal fun cacheNames(
    stem: String,
    layers: Int,
) = (0 until layers).flatMap { listOf("$stem$it.key", "$stem$it.value") }

private fun tensorFault(
    key: String,
    tensors: List<TensorSpec>,
    name: String,
    sizes: List<Long?>,
    dtypes: Set<String> = FLOATS,
) {
    val tensor = tensors.firstOrNull { it.name == name } ?: fault(key to "'$name' is missing")
    if (tensor.dtype !in dtypes) {
        fault(key to "'$name' is ${tensor.dtype}, where ${dtypes.joinToString(" or ")} is expected")
    }
    val fits =
        tensor.shape.size == sizes.size &&
            tensor.shape.zip(sizes).all { (have, want) -> want == null || have !is Long || have == want }
    if (!fits) {
        val wanted = sizes.joinToString { it?.toString() ?: "any" }
        fault(key to "'$name' has the shape ${shown(tensor.shape.joinToString())}, where $wanted is expected")
    }
}
