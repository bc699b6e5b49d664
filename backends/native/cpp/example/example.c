/* Runs a model on the arrays of the folder inputs, and says how far its outputs are from those in expected.
 *
 *   make && ./example [MODEL.sqm [THREADS]]
 *
 * Ends with 1 if something fails, or if an output of floating point is more than a hundredth of its greatest value
 * away. Another CPU may compute other last bits of exp and the like, and then round single values the other way.
 */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sqcompile.h"

#define TOLERANCE 0.01

/* How NumPy's files name the types of sqc_dtype, and the bytes of an element. */
static const char* const kTypes[] = {"<f4", "<i8", "<i4", "|i1", "|u1", "|b1"};
static const size_t kBytes[] = {4, 8, 4, 1, 1, 1};

static int fail(const char* what, const char* path) {
  fprintf(stderr, "example: %s%s%s\n", path, path[0] != '\0' ? ": " : "", what);
  return 0;
}

static size_t count_of(const sqc_tensor* tensor) {
  size_t count = 1;
  for (int32_t axis = 0; axis < tensor->rank; ++axis) count *= (size_t)tensor->shape[axis];
  return count;
}

/* Reads the type and the shape out of the header of a .npy file. */
static int parse_header(const char* header, sqc_tensor* tensor) {
  const char* at = strstr(header, "'descr': '");
  size_t type = 0;
  if (at == NULL || strstr(header, "'fortran_order': False") == NULL) return 0;
  for (at += 10; type < 6 && strncmp(at, kTypes[type], 3) != 0; ++type) {
  }
  if (type == 6) return 0;
  tensor->dtype = (sqc_dtype)type;
  tensor->rank = 0;
  at = strstr(header, "'shape': (");
  if (at == NULL) return 0;
  for (at += 10; *at != ')' && tensor->rank < SQC_MAX_RANK;) {
    char* end = NULL;
    tensor->shape[tensor->rank] = strtoll(at, &end, 10);
    if (end == at) return 0;
    ++tensor->rank;
    for (at = end; *at == ',' || *at == ' ';) ++at;
  }
  return *at == ')';
}

/* Reads FOLDER/NAME.npy; its data has to be freed. */
static int read_array(const char* folder, const sqc_port* port, sqc_tensor* tensor) {
  char path[1024], header[4096];
  unsigned char start[10];
  void* data = NULL;
  snprintf(path, sizeof(path), "%s/%.*s.npy", folder, (int)port->name_bytes, port->name);
  FILE* file = fopen(path, "rb");
  if (file == NULL) return fail("cannot be opened", path);
  int good = fread(start, 1, sizeof(start), file) == sizeof(start) && memcmp(start, "\x93NUMPY\x01", 7) == 0;
  const size_t bytes = good ? start[8] + 256u * start[9] : 0;
  good = good && bytes < sizeof(header) && fread(header, 1, bytes, file) == bytes;
  header[good ? bytes : 0] = '\0';
  good = good && parse_header(header, tensor);
  if (good) {
    const size_t count = count_of(tensor), size = kBytes[tensor->dtype];
    data = malloc(count * size + 1);
    good = data != NULL && fread(data, size, count, file) == count;
  }
  fclose(file);
  tensor->data = data;
  if (good) return 1;
  free(data);
  tensor->data = NULL;
  return fail("is no array that a model takes", path);
}

/* Prints an output and its distance from what was expected; whether it is near. */
static int compare(const sqc_port* port, const sqc_tensor* output, const sqc_tensor* expected) {
  const size_t count = count_of(output);
  printf("%.*s: %zu values", (int)port->name_bytes, port->name, count);
  if (output->dtype != expected->dtype || count != count_of(expected)) {
    printf(", where %zu were expected\n", count_of(expected));
    return 0;
  }
  if (output->dtype != SQC_F32) {
    const char *left = output->data, *right = expected->data;
    const size_t size = kBytes[output->dtype];
    size_t other = 0;
    for (size_t i = 0; i < count; ++i) other += memcmp(left + i * size, right + i * size, size) != 0;
    printf(", %zu other than expected\n", other);
    return 1;
  }
  const float *left = output->data, *right = expected->data;
  double greatest = 0.0, apart = 0.0;
  int finite = 1;
  for (size_t i = 0; i < count; ++i) {
    const double difference = fabs((double)left[i] - (double)right[i]);
    if (isfinite(right[i]) && fabs((double)right[i]) > greatest) greatest = fabs((double)right[i]);
    if (isfinite(difference) && difference > apart) apart = difference;
    if (isfinite(right[i]) != isfinite(left[i])) finite = 0;
  }
  for (size_t i = 0; i < count && i < 4; ++i) printf("%s%g", i == 0 ? " " : ", ", (double)left[i]);
  printf("%s; at most %.3g from what was expected, whose greatest is %.3g\n", count > 4 ? ", ..." : "", apart, greatest);
  return finite && apart <= TOLERANCE * greatest;
}

int main(int argc, char** argv) {
  const char* path = argc > 1 ? argv[1] : "model.sqm";
  const int threads = argc > 2 ? atoi(argv[2]) : 0; /* 0: one a core */
  sqc_model* model = NULL;
  sqc_session* session = NULL;
  sqc_status status = sqc_model_open(path, &model);
  if (status.code != SQC_OK) return fail(status.message, path), 1;

  const size_t count = sqc_model_input_count(model);
  sqc_tensor* inputs = calloc(count + 1, sizeof(sqc_tensor));
  int good = inputs != NULL;
  for (size_t i = 0; good && i < count; ++i) {
    sqc_port port;
    status = sqc_model_input(model, i, &port);
    good = status.code == SQC_OK && read_array("inputs", &port, &inputs[i]);
  }
  if (good) {
    status = sqc_session_create(model, threads, &session);
    if (status.code == SQC_OK) status = sqc_session_run(session, inputs, count);
    good = status.code == SQC_OK || fail(status.message, "");
  }
  if (good) printf("%s: %d threads, %s\n", path, sqc_session_threads(session), sqc_session_isa(session));
  for (size_t i = 0; good && i < sqc_model_output_count(model); ++i) {
    sqc_port port;
    sqc_tensor output, expected;
    status = sqc_model_output(model, i, &port);
    if (status.code == SQC_OK) status = sqc_session_output(session, i, &output);
    good = status.code == SQC_OK && read_array("expected", &port, &expected);
    if (!good) break;
    good = compare(&port, &output, &expected);
    free((void*)expected.data);
  }

  for (size_t i = 0; inputs != NULL && i < count; ++i) free((void*)inputs[i].data);
  free(inputs);
  sqc_session_destroy(session);
  sqc_model_close(model);
  return good ? 0 : 1;
}
