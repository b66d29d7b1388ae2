-- Read the oldest jobs, as many as are small enough together; of one that is too large, its length alone.
-- KEYS[1] jobs
-- ARGV[1] name of the field   ARGV[2] largest job in bytes   ARGV[3] entries, at most
-- Returns a list of {id, body or false, length}. A body that is too large never leaves the server.
local found, from, bytes = {}, '-', 0
local largest = tonumber(ARGV[2])
while #found < tonumber(ARGV[3]) and bytes < largest do
  local read = #found == 0 and redis.call or redis.pcall
  local entry = read('XRANGE', KEYS[1], from, '+', 'COUNT', 1)[1]
  if not entry then break end -- also where nothing can come behind the highest id
  local body, length = '', 0
  for place = 1, #entry[2], 2 do
    length = length + #entry[2][place] + #entry[2][place + 1]
    if entry[2][place] == ARGV[1] then body = entry[2][place + 1] end
  end
  if length > largest then body = false else bytes = bytes + length end
  found[#found + 1] = {entry[1], body, length}
  from = '(' .. entry[1]
end
return found
